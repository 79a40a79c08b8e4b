//! A directory of its own for a random checkpoint, removed afterwards.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::Checkpoint;
use model::synthetic::Recipe;

pub struct Written {
    dir: PathBuf,
    pub checkpoint: Arc<Checkpoint>,
}

impl Written {
    pub fn new(name: &str, recipe: &Recipe) -> Written {
        let dir =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        recipe.write(&dir).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        Written { dir, checkpoint }
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
