//! Who is a member of the mesh, and which router is its controller, where etcd
//! keeps the answer. What it says is advice: whoever is known stays known while
//! etcd is away, and whoever is connected is a member whatever etcd says. Rooms:
//!
//! - [`office`]: the office of controller, as a router holds it
//! - `etcd`, `election`: members' keys and the controller's; only builds with the
//!   feature `etcd` have them, others refuse the setting

#[cfg(feature = "etcd")]
mod election;
#[cfg(feature = "etcd")]
mod etcd;
pub mod office;

use std::fmt;
use std::str::FromStr;

#[cfg(not(feature = "etcd"))]
use self::office::Office;
#[cfg(not(feature = "etcd"))]
use crate::lifecycle::Shutdown;
use crate::tls::{Files, Role};
use crate::transport::Endpoint;

/// Where an etcd server is, as people write it: `https://host:2379`, `http://…`, or
/// without a scheme, which takes TLS if the process has certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// As it was written, if it was.
    secure: Option<bool>,
    address: Endpoint,
}

impl Server {
    /// TLS is spoken to it by a process that `has_certificates`.
    pub fn is_secure(&self, has_certificates: bool) -> bool {
        self.secure.unwrap_or(has_certificates)
    }

    /// Reached from this machine only.
    pub fn is_loopback(&self) -> bool {
        self.address.is_loopback()
    }
}

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (secure, rest) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (Some(true), rest),
            (_, Some(rest)) => (Some(false), rest),
            _ => (None, text),
        };
        match rest.parse() {
            Ok(address @ Endpoint::Tcp(_)) if !rest.contains("://") => Ok(Self { secure, address }),
            _ => Err(format!(
                "`{text}` is no etcd server: expected https://host:port or http://host:port"
            )),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.secure {
            Some(true) => "https://",
            Some(false) => "http://",
            None => "",
        };
        write!(f, "{scheme}{}", self.address)
    }
}

/// A process as others find it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub role: Role,
    pub id: String,
    pub endpoint: Endpoint,
    /// Digest of the model that it serves.
    pub model: [u8; 32],
}

/// The setting cannot be followed by this binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this binary was built without etcd: build it with `cargo build --release --features etcd`, \
     which needs protoc (Debian: protobuf-compiler)"
)]
pub struct BuiltWithout;

/// An etcd cluster and the part of it that is this mesh's; without the feature
/// `etcd` there is none.
#[derive(Clone, Debug)]
#[cfg_attr(not(feature = "etcd"), allow(dead_code, reason = "there is none to be read"))]
pub struct Etcd {
    servers: Vec<Server>,
    /// What the mesh's keys begin with.
    prefix: String,
    tls: Option<Files>,
    #[cfg(not(feature = "etcd"))]
    never: std::convert::Infallible,
}

impl Etcd {
    /// Keys of the mesh called `mesh` on `servers`, to which TLS is spoken with `tls`.
    ///
    /// # Errors
    /// The binary has no etcd client.
    pub fn new(servers: Vec<Server>, mesh: &str, tls: Option<Files>) -> Result<Self, BuiltWithout> {
        #[cfg(feature = "etcd")]
        return Ok(Self { servers, prefix: format!("/moemesh/{mesh}/"), tls });
        #[cfg(not(feature = "etcd"))]
        {
            let _ = (servers, mesh, tls);
            Err(BuiltWithout)
        }
    }
}

/// Nothing of this can be asked of an [`Etcd`] that cannot be.
#[cfg(not(feature = "etcd"))]
impl Etcd {
    /// Keeps `member` registered until `shutdown`.
    pub async fn register(self, _: Member, _: Shutdown) {
        match self.never {}
    }

    /// Has `hear` told of every member of `role`, again and again.
    pub async fn follow(self, _: Role, _: impl Fn(&Endpoint) + Send) {
        match self.never {}
    }

    /// Stands for the office of controller until `shutdown`.
    pub async fn campaign(self, _: String, _: Office, _: Shutdown) {
        match self.never {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_parse_as_people_write_them() {
        for (text, secure, loopback) in [
            ("http://127.0.0.1:2379", [false, false], true),
            ("https://etcd-0:2379", [true, true], false),
            ("localhost:2379", [false, true], true),
        ] {
            let server: Server = text.parse().unwrap();
            assert_eq!(server.to_string(), text);
            assert_eq!([false, true].map(|has| server.is_secure(has)), secure, "{text}");
            assert_eq!(server.is_loopback(), loopback, "{text}");
        }
        for bad in ["", "etcd", "unix:/x", "http://", "https://http://a:1", "a:1/x", "ftp://a:1"] {
            assert!(bad.parse::<Server>().unwrap_err().contains(&format!("`{bad}`")), "{bad}");
        }
    }

    #[test]
    fn only_builds_that_have_a_client_take_the_setting() {
        let etcd = Etcd::new(vec!["localhost:1".parse().unwrap()], "x", None);
        assert_eq!(etcd.is_ok(), cfg!(feature = "etcd"));
    }
}
