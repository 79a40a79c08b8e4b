//! The documents' commands run: every line of a `sh` block in README.md and
//! docs/ is executed against a mesh, except what only builds or tests the
//! project itself, which continuous integration runs as it is written.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::http::Address;
use crate::support::{Up, block_on, tiny};

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

/// Where the mesh keeps its state; removed when dropped.
struct State(PathBuf);

impl State {
    fn make() -> Self {
        let path = std::env::temp_dir().join(format!("moemesh-docs-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn every_documented_command_runs() {
    block_on(async {
        let state = State::make();
        let up = Up::start(&tiny(), &[], &[("XDG_RUNTIME_DIR", &state.0)]).await;
        let Address::Tcp(address) = &up.http else { panic!("no TCP") };

        let binary = Path::new(env!("CARGO_BIN_EXE_moemesh")).parent().unwrap();
        let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap());
        let mut ran = 0;
        for document in documents() {
            let text = std::fs::read_to_string(&document).unwrap();
            for command in commands(&text) {
                if ELSEWHERE.iter().any(|start| command.starts_with(start)) {
                    continue;
                }
                let local = command.replace("127.0.0.1:8080", address);
                let done = Command::new("bash")
                    .args(["-euo", "pipefail", "-c", &local])
                    .current_dir(env!("CARGO_MANIFEST_DIR"))
                    .env("PATH", &path)
                    .env("XDG_RUNTIME_DIR", &state.0)
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
        assert!(up.end("INT").success());
    });
}
