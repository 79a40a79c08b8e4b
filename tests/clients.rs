//! The real client libraries, which need Python: `tests/run` installs them and
//! runs this. Plain `cargo test` names it as left out.

use std::path::Path;
use std::process::Command;

#[test]
#[ignore = "needs Python and pinned packages: ./tests/run installs and runs them"]
fn the_openai_client_and_an_otlp_sink_are_served() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let status = Command::new(root.join(".venv/bin/python"))
        .args(["-m", "pytest", "-q", "tests/clients"])
        .current_dir(root)
        .env("MOEMESH", env!("CARGO_BIN_EXE_moemesh"))
        .status()
        .unwrap();
    assert!(status.success(), "pytest ended with {status}");
}
