//! Finds the model directory a command is about, and refuses early what cannot
//! be a Hugging Face checkpoint. What is in its files is for the roles to judge.

use std::path::{Path, PathBuf};

/// Where the bundled tiny model lies in the repository.
const BUNDLED: &str = "deploy/tiny";

/// Why there is no model to serve.
#[derive(Debug, thiserror::Error)]
pub enum ModelDirError {
    #[error("no bundled model in {BUNDLED} here or near the executable: name one with --model DIR")]
    NotBundled,
    #[error("model directory {0} does not exist")]
    Missing(PathBuf),
    #[error("{0} is not a directory: --model takes a directory with a Hugging Face checkpoint")]
    NotADirectory(PathBuf),
    #[error("{dir} holds no {file}: it is not a Hugging Face checkpoint")]
    Incomplete { dir: PathBuf, file: &'static str },
}

/// The directory that was asked for, or the bundled one, as an absolute path.
pub fn find(asked: Option<&Path>) -> Result<PathBuf, ModelDirError> {
    let dir = match asked {
        Some(dir) => dir.to_owned(),
        None => bundled().ok_or(ModelDirError::NotBundled)?,
    };
    let dir = dir.canonicalize().map_err(|_| ModelDirError::Missing(dir))?;
    if !dir.is_dir() {
        return Err(ModelDirError::NotADirectory(dir));
    }
    // Without a tokenizer a model can be served by token ids.
    if !dir.join("config.json").is_file() {
        return Err(ModelDirError::Incomplete { dir, file: "config.json" });
    }
    Ok(dir)
}

/// Looked for in the working directory, above the executable, and where this
/// binary was built.
fn bundled() -> Option<PathBuf> {
    let executable = std::env::current_exe().ok();
    let above = executable.iter().flat_map(|path| path.ancestors().skip(1)).map(Path::to_owned);
    std::iter::once(PathBuf::new())
        .chain(above)
        .chain([PathBuf::from(env!("CARGO_MANIFEST_DIR"))])
        .map(|base| base.join(BUNDLED))
        .find(|dir| dir.join("config.json").is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_a_checkpoint_is_named() {
        let missing = find(Some(Path::new("no/such/model"))).unwrap_err();
        assert_eq!(missing.to_string(), "model directory no/such/model does not exist");
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let file = find(Some(&manifest.join("Cargo.toml"))).unwrap_err();
        assert!(matches!(file, ModelDirError::NotADirectory(_)), "{file}");
        let sources = find(Some(&manifest.join("src"))).unwrap_err();
        assert!(
            sources
                .to_string()
                .ends_with("src holds no config.json: it is not a Hugging Face checkpoint")
        );
    }
}
