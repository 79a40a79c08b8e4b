//! Who an operator's command is: by its flags, or, on a mesh that `moemesh up
//! --tls` runs here, by the certificate that was made for this purpose.

use std::path::Path;

use mesh::tls::{Files, Owner, Role, Tls};

use crate::certs::authority::files_in;
use crate::cli::TlsArgs;
use crate::config::ConfigError;
use crate::config::given::Origin;

/// The operator whose certificate a local mesh comes with.
pub const LOCAL_OPERATOR: &str = "operator-0";

/// The identity to call with, if there is one. `local` is the directory with the
/// certificates of the mesh that is called, where it is one of this machine's.
///
/// # Errors
/// Some of the flags are missing, or the files cannot be used.
pub fn identity(args: &TlsArgs, local: Option<&Path>) -> anyhow::Result<Option<Tls>> {
    let TlsArgs { tls_cert, tls_key, tls_ca } = args;
    let files = match (tls_cert, tls_key, tls_ca) {
        (Some(certificate), Some(key), Some(authorities)) => Some(Files {
            certificate: certificate.clone(),
            key: key.clone(),
            authorities: authorities.clone(),
        }),
        (None, None, None) => local.map(|dir| files_in(dir, LOCAL_OPERATOR)),
        _ => {
            let given = [
                ("--tls-cert", tls_cert.is_some()),
                ("--tls-key", tls_key.is_some()),
                ("--tls-ca", tls_ca.is_some()),
            ];
            let missing: Vec<&str> =
                given.iter().filter(|(_, is)| !is).map(|(flag, _)| *flag).collect();
            return Err(ConfigError::Value {
                origin: Origin::Flag("--tls-cert, --tls-key, --tls-ca".to_owned()),
                key: "tls".to_owned(),
                problem: format!("all three are needed, {} is missing", missing.join(" and ")),
            }
            .into());
        }
    };
    let owner = Owner { role: Role::Operator, id: None };
    Ok(files.map(|files| Tls::load(&files, owner)).transpose()?)
}
