//! Unix sockets between processes of one host whose endpoint is host:port. A
//! process that listens on TCP also listens on an abstract Unix socket, which
//! exists only in its own network namespace, and says so when it is asked who it
//! is. A caller that finds the same process there uses it; everybody else goes on
//! over TCP. Names and proofs are random, of one start of the process.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;
use std::str::FromStr;

use crate::transport::{self, Endpoint, Listener};

/// Whether a way that is open only between processes of one host is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shortcut {
    /// Where both ends and the system can.
    #[default]
    Auto,
    Off,
}

impl fmt::Display for Shortcut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Off => "off",
        })
    }
}

impl FromStr for Shortcut {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            _ => Err(format!("`{text}` is neither auto nor off")),
        }
    }
}

/// What a process says about its Unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// Empty without a socket.
    pub endpoint: String,
    /// Proves to who asks over both that it is one process.
    pub instance: Vec<u8>,
}

impl Offer {
    /// The Unix socket that is offered.
    pub fn socket(endpoint: &str, instance: &[u8]) -> Option<Endpoint> {
        match endpoint.parse() {
            Ok(Endpoint::Unix(path)) if !instance.is_empty() => Some(Endpoint::Unix(path)),
            _ => None,
        }
    }
}

/// The socket beside a listener, and what to say about it. None is no failure:
/// callers then use the listener itself.
pub async fn beside(listener: &Listener, wanted: Shortcut) -> (Offer, Option<Listener>) {
    if wanted == Shortcut::Off || listener.local().is_local() {
        return Default::default();
    }
    match open().await {
        Ok((offer, near)) => (offer, Some(near)),
        Err(error) => {
            tracing::debug!(%error, "no Unix socket beside TCP");
            Default::default()
        }
    }
}

async fn open() -> Result<(Offer, Listener), Box<dyn std::error::Error + Send + Sync>> {
    let name: String = random()?.iter().map(|byte| format!("{byte:02x}")).collect();
    let endpoint = Endpoint::Unix(PathBuf::from(format!("@moemesh-{name}")));
    let listener = transport::bind(&endpoint).await?;
    Ok((Offer { endpoint: endpoint.to_string(), instance: random()?.to_vec() }, listener))
}

fn random() -> std::io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_unix_socket_with_a_proof_is_an_offer() {
        let socket = Some("unix:@x".parse().unwrap());
        assert_eq!(Offer::socket("unix:@x", &[1]), socket);
        for (endpoint, instance) in [("unix:@x", &[][..]), ("host:1", &[1]), ("", &[1])] {
            assert_eq!(Offer::socket(endpoint, instance), None);
        }
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_socket_lies_beside_tcp_only() {
        let tcp = transport::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
        let (offer, near) = beside(&tcp, Shortcut::Auto).await;
        assert_eq!(near.unwrap().local().to_string(), offer.endpoint);
        assert_eq!(offer.instance.len(), 16);
        let (other, second) = beside(&tcp, Shortcut::Auto).await;
        assert!(other != offer && second.is_some());
        assert!(beside(&tcp, Shortcut::Off).await.1.is_none());
        let unix = other.endpoint.replace('@', "@b-").parse().unwrap();
        let unix = transport::bind(&unix).await.unwrap();
        assert!(beside(&unix, Shortcut::Auto).await.1.is_none());
    }
}
