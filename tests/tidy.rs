//! The habits of ARCHITECTURE.md that a compiler does not check.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

const LONGEST_FILE: usize = 500;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file of the project, without what is generated.
fn sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let folders = ["src", "proto", "model", "mesh", "router", "expert-node", "gateway", "tests"];
    let mut open: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).collect();
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("gen") {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && !path.parent().unwrap().ends_with("gen")
            {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(root()).unwrap().to_owned(), text));
            }
        }
    }
    assert!(found.len() > 50, "the walk found only {} files", found.len());
    found
}

#[test]
fn files_are_short_and_say_what_they_are_for() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= LONGEST_FILE, "{} has {lines} lines", path.display());
        assert!(text.starts_with("//!"), "{} has no header", path.display());
    }
}

#[test]
fn data_paths_neither_unwrap_nor_ignore_mailbox_bounds() {
    for (path, text) in sources() {
        let tests = path.components().any(|part| {
            let name = part.as_os_str().to_string_lossy();
            name == "tests" || name == "tests.rs" || name == "benches" || name == "examples"
        });
        let production = text.split("#[cfg(test)]").next().unwrap_or_default();
        if !tests {
            let code = production.lines().filter(|line| !line.trim_start().starts_with("//"));
            for (number, line) in code.enumerate() {
                let bad = [".unwrap()", ".do_send(", "todo!(", "unimplemented!("];
                if let Some(bad) = bad.iter().find(|bad| line.contains(**bad)) {
                    panic!("{}: `{bad}` near line {}", path.display(), number + 1);
                }
            }
        }
    }
}

#[test]
fn unsafe_code_stands_where_it_is_known_to() {
    let known = [
        // Files are mapped.
        "model/src/checkpoint.rs",
        // Bytes are copied into and out of memory that two processes share.
        "mesh/src/shared/segment.rs",
        // Allocations are counted.
        "tests/allocations.rs",
    ];
    let word = ["unsafe", "{"].join(" ");
    for (path, text) in sources() {
        let known =
            path.starts_with("model/kernels") || known.iter().any(|file| path.ends_with(file));
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        let count = code.filter(|line| line.contains(&word)).count();
        assert!(known || count == 0, "{}: unsafe code", path.display());
    }
}

/// Which crates of the workspace each crate may depend on.
#[test]
fn dependencies_point_one_way() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("kernels", &[][..]),
        ("model", &["kernels"]),
        ("proto", &[]),
        ("mesh", &["proto"]),
        ("gateway", &["mesh", "proto"]),
        ("router", &["mesh", "proto", "model", "kernels"]),
        ("expert-node", &["mesh", "proto", "model", "kernels"]),
        ("moemesh", &["kernels", "model", "proto", "mesh", "gateway", "router", "expert-node"]),
    ]);
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert_eq!(packages.len(), allowed.len());
    for package in packages {
        let name = package["name"].as_str().unwrap();
        for dependency in package["dependencies"].as_array().unwrap() {
            let other = dependency["name"].as_str().unwrap();
            let ours = allowed.contains_key(other);
            assert!(!ours || allowed[name].contains(&other), "{name} depends on {other}");
            let maths = name == "model" || name == "kernels";
            assert!(
                !maths || !["tokio", "tonic", "prost", "actix"].contains(&other),
                "{name}: {other}"
            );
        }
    }
}
