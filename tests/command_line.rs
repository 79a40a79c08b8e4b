//! What a person types, and what the process says and exits with.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::process::{free_port, moemesh, run};
use crate::support::{Fixture, tiny};

fn refused(arguments: &[&str]) -> String {
    let (success, _, stderr) = run(moemesh().args(arguments));
    assert!(!success, "{arguments:?} succeeded");
    let complaints: Vec<&str> = stderr.lines().filter(|line| line.contains("error")).collect();
    assert_eq!(complaints.len(), 1, "one clear line, not:\n{stderr}");
    complaints[0].to_owned()
}

#[test]
fn generate_streams_text_and_exits_with_0() {
    let (success, stdout, stderr) = run(moemesh()
        .args(["generate", "Once upon a time", "--max-tokens", "24"])
        .current_dir(tiny()));
    assert!(success, "{stderr}");
    assert!(stdout.split_whitespace().count() > 5, "{stdout}");
}

#[test]
fn the_same_seed_gives_the_same_text() {
    let generate = |seed: &str| {
        let arguments =
            ["generate", "The old man", "--max-tokens", "24", "--temperature", "1", "--seed", seed];
        let (success, stdout, stderr) = run(moemesh().args(arguments));
        assert!(success, "{stderr}");
        stdout
    };
    let first = generate("7");
    assert_eq!(generate("7"), first);
    assert_ne!(generate("8"), first);
}

#[test]
fn a_missing_model_is_one_clear_line() {
    let line = refused(&["up", "--model", "/nowhere/at/all"]);
    assert!(line.contains("/nowhere/at/all"), "{line}");
}

#[test]
fn a_port_in_use_is_one_clear_line() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let line = refused(&["up", "--http", &address, "--no-demo"]);
    assert!(line.contains(&address) && line.contains("in use"), "{line}");
}

#[test]
fn a_broken_checkpoint_is_one_clear_line() {
    let broken = std::env::temp_dir().join(format!("moemesh-broken-{}", std::process::id()));
    std::fs::create_dir_all(&broken).unwrap();
    let fixture = Fixture::load("plain");
    for entry in std::fs::read_dir(&fixture.dir).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), broken.join(entry.file_name())).unwrap();
    }
    let weights = broken.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let http = format!("127.0.0.1:{}", free_port());
    let line = refused(&["up", "--model", broken.to_str().unwrap(), "--http", &http, "--no-demo"]);
    assert!(line.contains("model.safetensors"), "{line}");
    std::fs::remove_dir_all(broken).unwrap();
}

#[test]
fn a_bad_setting_names_file_line_and_key() {
    let path = std::env::temp_dir().join(format!("moemesh-bad-{}.toml", std::process::id()));
    std::fs::write(&path, "listen = \"127.0.0.1:7000\"\nkv_tokenz = 5\n").unwrap();
    let output =
        moemesh().args(["router", "--config"]).arg(&path).stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(64));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains(":2") && stderr.contains("kv_tokenz"), "{stderr}");
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_gpu_that_is_not_there_is_one_clear_line() {
    let model = format!("model_dir={}", tiny().display());
    for role in ["router", "expert-node"] {
        let process = [role, "--set", "listen=127.0.0.1:0", "--set", &model, "--device"];
        // Where there is a driver, it has fewer devices.
        let line = refused(&[&process[..], &["cuda:65535"]].concat());
        assert!(line.contains("device = \"cuda:65535\""), "{line}");
        let known = ["no CUDA driver", "there is no cuda:65535"];
        assert!(known.iter().any(|known| line.contains(known)), "{line}");
        let line = refused(&[&process[..], &["cuda"]].concat());
        assert!(line.contains("key `device`: `cuda` is neither cpu nor cuda:N"), "{line}");
        let f32 = [&process[..], &["cuda:0", "--set", "numerics=f32"]].concat();
        let line = refused(&f32);
        assert!(line.contains("set numerics to \"bf16\""), "{line}");
    }
}

/// The code that opens a GPU meets a driver that says what it is told (`support/driver.c`).
#[test]
fn a_gpu_that_will_not_do_is_one_clear_line() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = std::env::temp_dir().join(format!("moemesh-driver-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]).arg(dir.join("libcuda.so"));
    match compiler.arg(root.join("tests/support/driver.c")).status() {
        Ok(built) => assert!(built.success()),
        Err(error) => return println!("skipped: there is no C compiler: {error}"),
    }
    let model = format!("model_dir={}", tiny().display());
    for (driver, role, expected) in [
        ("11080 1 9 0 0", "router", "the CUDA driver supports CUDA 11.8 at most, 12.0 or newer"),
        (
            "11080 1 9 0 0",
            "expert-node",
            "the CUDA driver supports CUDA 11.8 at most, 12.0 or newer",
        ),
        ("13000 0 9 0 0", "expert-node", "there is no cuda:0: the driver has 0 device(s)"),
        ("12040 1 8 9 0", "router", "compute capability 8.9; kernels are built for 9.0"),
        ("12040 1 8 9 0", "expert-node", "compute capability 8.9; kernels are built for 9.0"),
        ("12040 1 9 0 1000", "router", "bytes of the memory of cuda:0, which has 1000 of"),
        (
            "12040 1 9 0 1000",
            "expert-node",
            "one expert takes 98304 bytes of device memory, 0 are given",
        ),
    ] {
        let mut process = moemesh();
        process.args([role, "--set", "listen=127.0.0.1:0", "--set", &model, "--device", "cuda:0"]);
        process.args(["--set", "log_filter=error"]).env("FAKE_CUDA", driver);
        let output = process.env("LD_LIBRARY_PATH", &dir).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{driver}, {role}: {said}");
        assert_eq!(said.lines().count(), 1, "{driver}, {role}: {said}");
        assert!(said.contains(expected), "{driver}, {role}: {said}");
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn completion_scripts_are_printed() {
    for shell in ["bash", "zsh", "fish"] {
        let (success, stdout, _) = run(moemesh().args(["completions", shell]));
        assert!(success && stdout.contains("expert-node"), "{shell}");
    }
}

#[test]
fn help_lists_every_benchmark() {
    let (success, stdout, _) = run(moemesh().args(["bench", "--help"]));
    assert!(success);
    for what in ["serve", "compare", "kernels", "device", "make-checkpoint"] {
        let listed = stdout.lines().any(|line| line.trim_start().starts_with(what));
        assert!(listed, "{what} is not in:\n{stdout}");
        let (success, stdout, _) = run(moemesh().args(["bench", what, "--help"]));
        assert!(success && stdout.contains("Examples:"), "{what}: {stdout}");
    }
}

#[test]
fn a_made_checkpoint_is_served_and_not_written_over() {
    let dir = std::env::temp_dir().join(format!("moemesh-made-{}", std::process::id()));
    let path = dir.to_str().unwrap();
    for dtype in ["bf16", "fp8"] {
        let make = ["bench", "make-checkpoint", path, "--size", "xs", "--dtype", dtype];
        let (success, stdout, stderr) = run(moemesh().args(make));
        assert!(success && stdout.contains("8 experts top-2"), "{stdout}{stderr}");
        let generate = ["generate", "abcd efgh", "--model", path, "--max-tokens", "8"];
        let (success, stdout, stderr) = run(moemesh().args(generate));
        assert!(success && !stdout.trim().is_empty(), "{stdout}{stderr}");
        assert!(refused(&make).contains("is not empty"));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

#[test]
fn a_rate_has_to_be_one() {
    assert!(refused(&["bench", "serve", "--rate", "0"]).contains("--rate 0"));
    assert!(refused(&["bench", "compare", "--rounds", "1"]).contains("--peer"));
}
