//! What each end of a connection requires of the other one's certificate beyond
//! what TLS itself does: an identity of this mesh, and for a client the role, and
//! perhaps the id, that it looked for. Host names mean nothing here: processes
//! move, identities stay.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    PeerIncompatible, RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::principal::{Principal, PrincipalError, Role};

/// Whom a client wants to find at an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    pub role: Role,
    /// `None` takes any id of the role.
    pub id: Option<String>,
}

impl Expected {
    pub fn any(role: Role) -> Self {
        Self { role, id: None }
    }
}

/// Why a certificate that TLS accepts is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("{0}")]
    Principal(#[from] PrincipalError),
    #[error("it belongs to the mesh `{got}`, this process to `{want}`")]
    Mesh { got: String, want: String },
    #[error("it is {got}, not a process of role {want}")]
    Role { got: String, want: Role },
    #[error("another node is at this address: it is {got}, expected was {want}")]
    Id { got: String, want: String },
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refused))))
    }
}

fn of_mesh(certificate: &CertificateDer<'_>, mesh: &str) -> Result<Principal, Refused> {
    let principal = Principal::of(certificate)?;
    if principal.mesh == mesh {
        return Ok(principal);
    }
    Err(Refused::Mesh { got: principal.mesh, want: mesh.to_owned() })
}

fn check(principal: &Principal, expected: &Expected) -> Result<(), Refused> {
    if principal.role != expected.role {
        return Err(Refused::Role { got: principal.short(), want: expected.role });
    }
    match &expected.id {
        Some(id) if *id != principal.id => {
            Err(Refused::Id { got: principal.short(), want: format!("{}/{id}", expected.role) })
        }
        _ => Ok(()),
    }
}

/// A client's judgement of servers.
#[derive(Debug)]
pub(super) struct Servers {
    pub roots: Arc<RootCertStore>,
    pub algorithms: WebPkiSupportedAlgorithms,
    pub mesh: String,
    pub expected: Expected,
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            algorithms,
        )?;
        let principal = of_mesh(certificate, &self.mesh)?;
        check(&principal, &self.expected)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// A server's judgement of clients: any role of this mesh may connect; what it
/// may call is [`crate::authz`]'s matter.
#[derive(Debug)]
pub(super) struct Clients {
    pub inner: Arc<dyn ClientCertVerifier>,
    pub mesh: String,
}

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(certificate, intermediates, now)?;
        of_mesh(certificate, &self.mesh)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
