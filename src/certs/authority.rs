//! An authority in a directory: `ca.pem`, `ca.key`, and beside them what it has
//! issued. Files are written whole or not at all, keys for their owner only, and
//! nothing that a process would refuse is put in place.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use mesh::tls::{
    self, Files, Owner, Principal, PrincipalError, Role, Tls, TlsError, Validity, authority_uri,
    mesh_of_authority,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use time::{Date, Duration, OffsetDateTime};

const CERTIFICATE: &str = "ca.pem";
const KEY: &str = "ca.key";
/// The id whose files would be the authority's own.
const RESERVED_ID: &str = "ca";
/// Certificates begin this much in the past, for clocks that are behind.
const SLACK: Duration = Duration::minutes(5);

/// Why no certificate was made.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    #[error("{0} is there already: give --force to replace it")]
    Exists(PathBuf),
    #[error("there is no authority in {0}: make one with `moemesh certs init`")]
    Missing(PathBuf),
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: {problem}")]
    Unusable { path: PathBuf, problem: String },
    #[error("the id `{RESERVED_ID}` is the authority's own")]
    Reserved,
    #[error(transparent)]
    Principal(#[from] PrincipalError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// An authority that can issue.
pub struct Authority {
    dir: PathBuf,
    mesh: String,
    until: OffsetDateTime,
    issuer: Issuer<'static, KeyPair>,
}

/// One certificate and where it is.
#[derive(Debug)]
pub struct Issued {
    pub principal: Principal,
    pub until: Date,
    pub files: Files,
}

impl Issued {
    /// The lines of a configuration file that use it.
    pub fn settings(&self) -> String {
        let Files { certificate, key, authorities } = &self.files;
        format!("tls_cert = {certificate:?}\ntls_key = {key:?}\ntls_ca = {authorities:?}")
    }
}

impl Authority {
    /// Whether a directory has one.
    pub fn is_in(dir: &Path) -> bool {
        dir.join(CERTIFICATE).exists()
    }

    /// Makes one in `dir`.
    pub fn create(dir: &Path, mesh: &str, days: u32, force: bool) -> Result<Self, CertsError> {
        let (certificate, key) = (dir.join(CERTIFICATE), dir.join(KEY));
        refuse_existing([&certificate, &key], force)?;
        // Says what is wrong with the name, if anything is.
        Principal::new(mesh, Role::Operator, "x")?;
        let now = OffsetDateTime::now_utc();
        let until = now + Duration::days(i64::from(days));
        let mut params = params(mesh)?;
        (params.not_before, params.not_after) = (now - SLACK, until);
        let pair = KeyPair::generate()?;
        let signed = params.self_signed(&pair)?;
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(written(dir))?;
        Draft::write(key, &pair.serialize_pem(), 0o600)?.publish()?;
        Draft::write(certificate, &signed.pem(), 0o644)?.publish()?;
        let issuer = Issuer::new(params, pair);
        Ok(Self { dir: dir.to_owned(), mesh: mesh.to_owned(), until, issuer })
    }

    /// Reads the one in `dir`.
    pub fn open(dir: &Path) -> Result<Self, CertsError> {
        let (path, key) = (dir.join(CERTIFICATE), dir.join(KEY));
        if !path.exists() {
            return Err(CertsError::Missing(dir.to_owned()));
        }
        let refused = |problem: String| CertsError::Unusable { path: path.clone(), problem };
        let certificates = tls::certificates(&path)?;
        let mesh = mesh_of_authority(&certificates[0]).map_err(|e| refused(e.to_string()))?;
        let until = Validity::of(&certificates[0])
            .and_then(|validity| OffsetDateTime::from_unix_timestamp(validity.not_after).ok())
            .ok_or_else(|| refused("its dates are unreadable".to_owned()))?;
        let pem = fs::read_to_string(&key)
            .map_err(|source| CertsError::Read { path: key.clone(), source })?;
        let pair = KeyPair::from_pem(&pem)
            .map_err(|error| CertsError::Unusable { path: key, problem: error.to_string() })?;
        let issuer = Issuer::new(params(&mesh)?, pair);
        Ok(Self { dir: dir.to_owned(), mesh, until, issuer })
    }

    /// Issues one certificate.
    pub fn issue(
        &self,
        role: Role,
        id: &str,
        days: u32,
        force: bool,
    ) -> Result<Issued, CertsError> {
        if id == RESERVED_ID {
            return Err(CertsError::Reserved);
        }
        let principal = Principal::new(&self.mesh, role, id)?;
        if !force {
            self.refuse_existing(id)?;
        }
        let now = OffsetDateTime::now_utc();
        let mut params = CertificateParams::default();
        params.not_before = now - SLACK;
        params.not_after = (now + Duration::days(i64::from(days))).min(self.until);
        params.distinguished_name = name(id);
        params.subject_alt_names = vec![SanType::URI(principal.to_string().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if matches!(role, Role::Router | Role::ExpertNode) {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.use_authority_key_identifier_extension = true;
        let pair = KeyPair::generate()?;
        let signed = params.signed_by(&pair, &self.issuer)?;

        let files = self.files(id);
        let key = Draft::write(files.key.clone(), &pair.serialize_pem(), 0o600)?;
        let certificate = Draft::write(files.certificate.clone(), &signed.pem(), 0o644)?;
        let drafts = Files {
            certificate: certificate.draft.clone(),
            key: key.draft.clone(),
            authorities: files.authorities.clone(),
        };
        // As the process will read them: an authority whose key and certificate
        // are not of one another is found here.
        Tls::load(&drafts, Owner { role, id: Some(id.to_owned()) })?;
        key.publish()?;
        certificate.publish()?;
        Ok(Issued { principal, until: params.not_after.date(), files })
    }

    /// # Errors
    /// The files of `id` are there.
    pub fn refuse_existing(&self, id: &str) -> Result<(), CertsError> {
        let files = self.files(id);
        refuse_existing([&files.certificate, &files.key], false)
    }

    pub fn files(&self, id: &str) -> Files {
        files_in(&self.dir, id)
    }

    pub fn certificate(&self) -> PathBuf {
        self.dir.join(CERTIFICATE)
    }

    pub fn key(&self) -> PathBuf {
        self.dir.join(KEY)
    }

    pub fn until(&self) -> Date {
        self.until.date()
    }
}

/// Where an authority in `dir` puts the certificate of `id`.
pub fn files_in(dir: &Path, id: &str) -> Files {
    Files {
        certificate: dir.join(format!("{id}.pem")),
        key: dir.join(format!("{id}.key")),
        authorities: dir.join(CERTIFICATE),
    }
}

/// What an authority's certificate says, but for its dates. It follows from the
/// mesh's name alone, so that an authority can be opened by it.
fn params(mesh: &str) -> Result<CertificateParams, CertsError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = name(&format!("moemesh authority of {mesh}"));
    params.subject_alt_names = vec![SanType::URI(authority_uri(mesh).try_into()?)];
    // It signs processes' certificates, not other authorities.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn name(text: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, text);
    name
}

fn refuse_existing(paths: [&PathBuf; 2], force: bool) -> Result<(), CertsError> {
    match paths.into_iter().find(|path| !force && path.exists()) {
        Some(path) => Err(CertsError::Exists(path.clone())),
        None => Ok(()),
    }
}

fn written(path: &Path) -> impl FnOnce(io::Error) -> CertsError {
    let path = path.to_owned();
    |source| CertsError::Write { path, source }
}

/// A file that is not in its place yet, removed unless it is published.
struct Draft {
    draft: PathBuf,
    place: PathBuf,
}

impl Draft {
    fn write(place: PathBuf, text: &str, mode: u32) -> Result<Self, CertsError> {
        let mut draft = place.clone().into_os_string();
        draft.push(format!(".{}.part", std::process::id()));
        let draft = PathBuf::from(draft);
        let write = || {
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()
        };
        write().map_err(written(&place))?;
        Ok(Self { draft, place })
    }

    fn publish(self) -> Result<(), CertsError> {
        fs::rename(&self.draft, &self.place).map_err(written(&self.place))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // It is gone already if it was published.
        let _ = fs::remove_file(&self.draft);
    }
}

#[cfg(test)]
mod tests;
