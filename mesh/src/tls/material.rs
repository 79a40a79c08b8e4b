//! The three files of a process's identity, read and checked as a whole: nothing
//! of them is used unless all of it can be.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};

use super::explain::explain;
use super::principal::{Principal, PrincipalError, Role};
use super::validity::Validity;
use super::verify::{Clients, Expected, Servers};

/// gRPC is HTTP/2.
const PROTOCOL: &[u8] = b"h2";
/// More certificates than a chain or a set of authorities has.
const MOST_CERTIFICATES: usize = 64;

/// Where a process's certificate, its key and the authorities it trusts are, as PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub authorities: PathBuf,
}

/// Why these files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {path}: {problem}")]
    Read { path: PathBuf, problem: String },
    #[error("{path} holds no {what}")]
    Empty { path: PathBuf, what: &'static str },
    #[error("{path}: {problem}")]
    Key { path: PathBuf, problem: String },
    #[error("{key} is not the key of {certificate}")]
    Mismatch { certificate: PathBuf, key: PathBuf },
    #[error("{path}: {source}")]
    Principal { path: PathBuf, source: PrincipalError },
    #[error("{path}: {problem}")]
    Certificate { path: PathBuf, problem: String },
    #[error("{authorities}: {problem}")]
    Authorities { authorities: PathBuf, problem: String },
    #[error("{path} is the certificate of {got}, this process is {want}")]
    Owner { path: PathBuf, got: Principal, want: String },
}

/// Who a process is by its configuration, which its certificate must say too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub role: Role,
    /// `None` takes any id.
    pub id: Option<String>,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.id {
            Some(id) => write!(f, "{} `{id}`", self.role),
            None => write!(f, "of role {}", self.role),
        }
    }
}

/// One reading of the files.
#[derive(Debug)]
pub(super) struct Material {
    pub principal: Principal,
    pub validity: Validity,
    /// When the first of the trusted authorities ends.
    pub authorities_until: i64,
    pub server: Arc<ServerConfig>,
    clients: Arc<Clients>,
    provider: Arc<CryptoProvider>,
    pub roots: Arc<RootCertStore>,
    identity: Arc<SingleCertAndKey>,
}

impl Material {
    /// Reads the files and refuses what no other process would accept.
    pub fn read(files: &Files, owner: &Owner) -> Result<Self, TlsError> {
        let (material, chain) = Self::unchecked(files, owner)?;
        material.clients.verify_client_cert(&chain[0], &chain[1..], UnixTime::now()).map_err(
            |error| TlsError::Certificate {
                path: files.certificate.clone(),
                problem: explain(&error).unwrap_or_else(|| error.to_string()),
            },
        )?;
        Ok(material)
    }

    /// All of it but whether the certificate is signed by an authority and valid
    /// now; and the certificate with its intermediates.
    pub(super) fn unchecked(
        files: &Files,
        owner: &Owner,
    ) -> Result<(Self, Vec<CertificateDer<'static>>), TlsError> {
        let path = &files.certificate;
        let provider = Arc::new(ring::default_provider());
        let chain = certificates(path)?;
        let refused = |problem| TlsError::Certificate { path: path.clone(), problem };
        let principal = Principal::of(&chain[0])
            .map_err(|source| TlsError::Principal { path: path.clone(), source })?;
        let validity = Validity::of(&chain[0])
            .ok_or_else(|| refused("its dates are unreadable".to_owned()))?;
        if principal.role != owner.role || owner.id.as_ref().is_some_and(|id| *id != principal.id) {
            let (path, want) = (path.clone(), owner.to_string());
            return Err(TlsError::Owner { path, got: principal, want });
        }
        let (roots, authorities_until) = authorities(&files.authorities)?;
        let clients = clients(roots.clone(), &provider, &principal.mesh).map_err(|problem| {
            TlsError::Authorities { authorities: files.authorities.clone(), problem }
        })?;
        let identity = certified(files, chain.clone(), &provider)?;
        let identity = Arc::new(SingleCertAndKey::from(identity));

        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| refused(error.to_string()))?
            .with_client_cert_verifier(clients.clone())
            .with_cert_resolver(identity.clone());
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        // A resumed session would outlive the certificate that it began with.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        let server = Arc::new(server);
        let material = Self {
            principal,
            validity,
            authorities_until,
            server,
            clients,
            provider,
            roots,
            identity,
        };
        Ok((material, chain))
    }

    /// How a client of this identity connects to whom it expects.
    pub fn client(&self, expected: Expected) -> Result<Arc<ClientConfig>, rustls::Error> {
        let servers = Servers {
            roots: self.roots.clone(),
            algorithms: self.provider.signature_verification_algorithms,
            mesh: self.principal.mesh.clone(),
            expected,
        };
        let mut client = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(servers))
            .with_client_cert_resolver(self.identity.clone());
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        Ok(Arc::new(client))
    }
}

/// The certificates of a PEM file, at least one.
///
/// # Errors
/// Names the file.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let refused = |error: rustls_pki_types::pem::Error| TlsError::Read {
        path: path.to_owned(),
        problem: pem_problem(error),
    };
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(refused)?
        .take(MOST_CERTIFICATES)
        .collect::<Result<_, _>>()
        .map_err(refused)?;
    if found.is_empty() {
        return Err(TlsError::Empty { path: path.to_owned(), what: "certificate" });
    }
    Ok(found)
}

fn pem_problem(error: rustls_pki_types::pem::Error) -> String {
    match error {
        rustls_pki_types::pem::Error::Io(error) => error.to_string(),
        rustls_pki_types::pem::Error::MissingSectionEnd { .. } => "it is cut short".to_owned(),
        other => format!("it is not PEM: {other}"),
    }
}

fn certified(
    files: &Files,
    chain: Vec<CertificateDer<'static>>,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, TlsError> {
    let path = &files.key;
    let key = PrivateKeyDer::from_pem_file(path).map_err(|error| match error {
        rustls_pki_types::pem::Error::NoItemsFound => {
            TlsError::Empty { path: path.clone(), what: "private key" }
        }
        error => TlsError::Read { path: path.clone(), problem: pem_problem(error) },
    })?;
    CertifiedKey::from_der(chain, key, provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            TlsError::Mismatch { certificate: files.certificate.clone(), key: path.clone() }
        }
        error => TlsError::Key { path: path.clone(), problem: error.to_string() },
    })
}

fn authorities(path: &Path) -> Result<(Arc<RootCertStore>, i64), TlsError> {
    let mut roots = RootCertStore::empty();
    let mut until = i64::MAX;
    for certificate in certificates(path)? {
        let refused = |problem| TlsError::Authorities { authorities: path.to_owned(), problem };
        let validity = Validity::of(&certificate)
            .ok_or_else(|| refused("a certificate's dates are unreadable".to_owned()))?;
        until = until.min(validity.not_after);
        roots.add(certificate).map_err(|error| refused(error.to_string()))?;
    }
    Ok((Arc::new(roots), until))
}

fn clients(
    roots: Arc<RootCertStore>,
    provider: &Arc<CryptoProvider>,
    mesh: &str,
) -> Result<Arc<Clients>, String> {
    let inner = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(|error| error.to_string())?;
    Ok(Arc::new(Clients { inner, mesh: mesh.to_owned() }))
}
