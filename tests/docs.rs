//! The documents' commands run: every line of a `sh` block in README.md and
//! docs/ is executed against a mesh, except what only builds or tests the
//! project itself, which continuous integration runs as it is written.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::http::{Address, get};
use crate::support::sandbox::{free_port, moemesh, signal};
use crate::support::{block_on, tiny};

/// Lines that are not run here, by their beginning, and who runs them.
const ELSEWHERE: [&str; 2] = [
    "cargo run",   // tests/lifecycle.rs runs `moemesh up`
    "./tests/run", // runs this
];

fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = vec![root.join("README.md")];
    for entry in std::fs::read_dir(root.join("docs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path);
        }
    }
    found
}

/// The commands of the `sh` blocks; a line that ends in `\` goes on.
fn commands(text: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let (mut inside, mut more) = (false, false);
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            inside = !inside && line.trim() == "```sh";
            continue;
        }
        if !inside || line.trim().is_empty() || line.trim_start().starts_with('#') {
            continue;
        }
        match (more, found.last_mut()) {
            (true, Some(last)) => {
                last.push('\n');
                last.push_str(line);
            }
            _ => found.push(line.to_owned()),
        }
        more = line.ends_with('\\');
    }
    found
}

#[test]
fn every_documented_command_runs() {
    block_on(async {
        let address = format!("127.0.0.1:{}", free_port());
        let state = std::env::temp_dir().join(format!("moemesh-docs-{}", std::process::id()));
        std::fs::create_dir_all(&state).unwrap();
        let mut up = moemesh()
            .args(["up", "--no-demo", "--http", &address, "--model"])
            .arg(tiny())
            .env("XDG_RUNTIME_DIR", &state)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(up.stdout.take().unwrap()).lines();
        std::thread::spawn(move || while let Some(Ok(_)) = output.next() {});
        let http = Address::Tcp(address.clone());
        while !get(&http, "/readyz").await.is_ok_and(|(status, _)| status == 200) {
            assert!(up.try_wait().unwrap().is_none(), "the mesh ended");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }

        let binary = Path::new(env!("CARGO_BIN_EXE_moemesh")).parent().unwrap();
        let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap());
        let mut ran = 0;
        for document in documents() {
            let text = std::fs::read_to_string(&document).unwrap();
            for command in commands(&text) {
                if ELSEWHERE.iter().any(|start| command.starts_with(start)) {
                    continue;
                }
                let local = command.replace("127.0.0.1:8080", &address);
                let done = Command::new("bash")
                    .args(["-euo", "pipefail", "-c", &local])
                    .current_dir(env!("CARGO_MANIFEST_DIR"))
                    .env("PATH", &path)
                    .env("XDG_RUNTIME_DIR", &state)
                    .stdin(Stdio::null())
                    .output()
                    .unwrap();
                let said = String::from_utf8_lossy(&done.stderr);
                assert!(
                    done.status.success(),
                    "{}: `{command}` failed: {said}",
                    document.display()
                );
                assert!(!done.stdout.is_empty(), "`{command}` printed nothing");
                ran += 1;
            }
        }
        assert!(ran >= 8, "only {ran} commands were found");
        signal(up.id(), "INT");
        assert!(up.wait().unwrap().success());
        std::fs::remove_dir_all(state).unwrap();
    });
}
