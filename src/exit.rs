//! Exit codes, and which of them mean that starting the same process again
//! would fail in the same way. The codes are those of BSD's `sysexits.h`.

use anyhow::Error;
use mesh::tls::TlsError;

use crate::client::ClientError;
use crate::config::ConfigError;
use crate::model_dir::ModelDirError;

/// The command line or the configuration is wrong (`EX_USAGE`).
pub const USAGE: u8 = 64;
/// The checkpoint is wrong (`EX_DATAERR`).
pub const DATA: u8 = 65;
/// Ended by Ctrl-C.
pub const INTERRUPTED: u8 = 130;

/// Codes after which `moemesh up` does not start a process again.
pub const IN_VAIN: [i32; 2] = [USAGE as i32, DATA as i32];

/// The checkpoint that a role was given cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadCheckpoint(pub String);

/// The user asked to stop.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Certificate files are as much a part of the configuration as what names them.
fn bad_tls(error: &Error) -> bool {
    error.is::<TlsError>()
        || matches!(error.downcast_ref(), Some(gateway::Error::Tls(_)))
        || matches!(error.downcast_ref(), Some(router::Error::Tls(_)))
        || matches!(error.downcast_ref(), Some(expert_node::Error::Tls(_)))
}

/// The exit code for a failure.
pub fn code(error: &Error) -> u8 {
    let bad_url = matches!(error.downcast_ref(), Some(ClientError::Url { .. }));
    let no_device = matches!(error.downcast_ref(), Some(expert_node::Error::Device(..)))
        || matches!(error.downcast_ref(), Some(router::Error::Device(..)));
    if bad_url || no_device || error.is::<ConfigError>() || bad_tls(error) {
        USAGE
    } else if error.is::<BadCheckpoint>() || error.is::<ModelDirError>() {
        DATA
    } else if error.is::<Interrupted>() {
        INTERRUPTED
    } else {
        1
    }
}
