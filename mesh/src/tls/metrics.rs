//! What operators see of TLS: how long certificates last, who was refused and
//! why, and whether new files were taken.

use std::fmt;
use std::io;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use rustls::{CertificateError, Error};

use super::{Tls, now};

/// Why a connection was refused, to be counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Refusal {
    /// Nothing that TLS begins with.
    Plain,
    NoCertificate,
    Expired,
    UnknownAuthority,
    /// A sound certificate that names nobody of this mesh.
    Identity,
    Slow,
    /// To make room for other handshakes.
    PushedOut,
    Other,
}

impl Refusal {
    pub(super) fn of(error: &io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(Error::NoCertificatesPresented) => Self::NoCertificate,
            Some(Error::InvalidCertificate(error)) => match error {
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                    Self::Expired
                }
                CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                    Self::UnknownAuthority
                }
                CertificateError::Other(_) => Self::Identity,
                _ => Self::Other,
            },
            _ => Self::Other,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plaintext",
            Self::NoCertificate => "no_certificate",
            Self::Expired => "expired",
            Self::UnknownAuthority => "unknown_authority",
            Self::Identity => "identity",
            Self::Slow => "slow",
            Self::PushedOut => "pushed_out",
            Self::Other => "other",
        }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// Counters of one process; clones are the same ones.
#[derive(Clone, Debug, Default)]
pub struct TlsMetrics {
    refused: Family<Reason, Counter>,
    denied: Counter,
    reloads: Counter,
    failed_reloads: Counter,
}

impl TlsMetrics {
    pub(super) fn register(&self, registry: &mut Registry, tls: Tls) {
        registry.register(
            "tls_refused",
            "Connections refused before or during the TLS handshake",
            self.refused.clone(),
        );
        registry.register(
            "tls_denied_calls",
            "Calls refused because of the caller's role",
            self.denied.clone(),
        );
        registry.register(
            "tls_reloads",
            "Times that new certificate files were taken",
            self.reloads.clone(),
        );
        registry.register(
            "tls_failed_reloads",
            "Times that new certificate files were unusable and the old ones kept",
            self.failed_reloads.clone(),
        );
        registry.register_collector(Box::new(Expiry(tls)));
    }

    pub(super) fn refused(&self, reason: Refusal) {
        self.refused.get_or_create(&Reason { reason: reason.name() }).inc();
    }

    pub(crate) fn denied(&self) {
        self.denied.inc();
    }

    pub(super) fn reloaded(&self, taken: bool) {
        if taken { &self.reloads } else { &self.failed_reloads }.inc();
    }
}

/// Seconds until certificates end, negative afterwards.
#[derive(Debug)]
struct Expiry(Tls);

impl Collector for Expiry {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let material = self.0.material();
        let mut to = encoder.encode_descriptor(
            "tls_certificate_expiry",
            "Time until a certificate ends: this process's own, or the first authority it trusts",
            Some(&Unit::Seconds),
            MetricType::Gauge,
        )?;
        for (of, until) in
            [("own", material.validity.not_after), ("authority", material.authorities_until)]
        {
            let left = ConstGauge::new(until.saturating_sub(now()));
            left.encode(to.encode_family(&[("certificate", of)])?)?;
        }
        Ok(())
    }
}
