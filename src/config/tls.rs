//! The keys of a process's identity: three files, all of them or none, and the
//! word without which nothing inside the mesh listens in plain text to others
//! than this machine.

use std::path::PathBuf;

use mesh::tls::Files;
use mesh::transport::Endpoint;

use crate::config::ConfigError;
use crate::config::reader::Reader;

/// The process's certificate, key and authorities, if it has them.
pub fn files(reader: &mut Reader<'_>) -> Result<Option<Files>, ConfigError> {
    let certificate: Option<PathBuf> = reader.optional(
        "tls_cert",
        "\"/etc/moemesh/tls.pem\"",
        "This process's certificate (PEM), which has its role and id; `moemesh certs` issues\n\
         them. With tls_key and tls_ca, gRPC is mutual TLS; files that change are read again.",
    )?;
    let key: Option<PathBuf> =
        reader.optional("tls_key", "\"/etc/moemesh/tls.key\"", "Its private key (PEM).")?;
    let authorities: Option<PathBuf> = reader.optional(
        "tls_ca",
        "\"/etc/moemesh/ca.pem\"",
        "Authorities whose certificates are trusted (PEM).",
    )?;
    let keys = [
        ("tls_cert", certificate.is_some()),
        ("tls_key", key.is_some()),
        ("tls_ca", authorities.is_some()),
    ];
    match (certificate, key, authorities) {
        (Some(certificate), Some(key), Some(authorities)) => {
            Ok(Some(Files { certificate, key, authorities }))
        }
        (None, None, None) => Ok(None),
        _ => {
            let names = |set| -> Vec<&str> {
                keys.iter().filter(|(_, is)| *is == set).map(|(key, _)| *key).collect()
            };
            let (there, missing) = (names(true), names(false));
            let missing = missing.join(" and ");
            let problem = format!("TLS needs tls_cert, tls_key and tls_ca; not set: {missing}");
            Err(reader.refuse(there[0], problem))
        }
    }
}

/// Whether plain text may go where others can read it.
pub fn insecure(reader: &mut Reader<'_>) -> Result<bool, ConfigError> {
    reader.or(
        "insecure",
        false,
        "Whether gRPC may be plain text on an address that other machines reach, and to etcd on\n\
         another machine.",
    )
}

/// As [`files`], for a process that serves the inside of the mesh on `listen`; and
/// whether it may be [`insecure`].
pub fn files_of_server(
    reader: &mut Reader<'_>,
    listen: &Endpoint,
) -> Result<(Option<Files>, bool), ConfigError> {
    let files = files(reader)?;
    let insecure = insecure(reader)?;
    if files.is_none() && !insecure && !listen.is_loopback() {
        let problem = format!(
            "other machines reach {listen}, and without TLS anyone may call it: set tls_cert, \
             tls_key and tls_ca (`moemesh certs` makes them), or insecure = true where the \
             network is trusted"
        );
        return Err(reader.refuse("listen", problem));
    }
    Ok((files, insecure))
}
