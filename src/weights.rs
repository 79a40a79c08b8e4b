//! `--weights fp8`: the model directory that a local mesh is started on is then a
//! copy with FP8 projections, made once and kept in the user's cache directory,
//! so that all processes map the same file and the next start finds it ready.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::UNIX_EPOCH;

use anyhow::Context as _;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use kernels::{Compute, Isa};
use model::{Checkpoint, QuantizeError, Quantized};
use sha2::{Digest as _, Sha256};

use crate::config::local::Local;
use crate::config::setting::Weights;
use crate::exit::{BadCheckpoint, Interrupted};
use crate::model_dir;
use crate::up::Signals;
use crate::up::console::Console;

/// The directory to serve: the one asked for, or its FP8 copy, which is made if
/// it is not there yet.
///
/// # Errors
/// No such model, weights that cannot be converted, no room for the copy, Ctrl-C.
pub async fn model_dir(
    local: &Local,
    console: &Console,
    signals: &mut Signals,
) -> anyhow::Result<PathBuf> {
    let source = model_dir::find(local.model.as_deref())?;
    if local.weights == Weights::Stored {
        return Ok(source);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, console, threads) = (stop.clone(), console.clone(), local.threads);
    let base = cache_dir().context("no directory for the FP8 copy: set XDG_CACHE_HOME or HOME")?;
    let mut work =
        tokio::task::spawn_blocking(move || fp8_copy(&source, &base, threads, &console, &stopped));
    tokio::select! {
        done = &mut work => done.context("the conversion to FP8 panicked")?,
        () = signals.any() => {
            stop.store(true, Ordering::Relaxed);
            // It looks at the switch after every tensor, then takes away what it wrote.
            let _ = work.await;
            Err(Interrupted.into())
        }
    }
}

fn cache_dir() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("moemesh").join("fp8"))
}

/// Finds or makes the copy of `source` under `base`.
fn fp8_copy(
    source: &Path,
    base: &Path,
    threads: usize,
    console: &Console,
    stop: &AtomicBool,
) -> anyhow::Result<PathBuf> {
    let checkpoint = Checkpoint::open(source).map_err(|error| BadCheckpoint(error.to_string()))?;
    let name = source.file_name().unwrap_or_default().to_string_lossy();
    let home = base.join(identity(source, &checkpoint)?);
    // A mesh's name is its directory's.
    let copy = home.join(format!("{name}-fp8"));
    let at = |what: &'static str, path: &Path| format!("{what} {}", path.display());
    fs::create_dir_all(&home).with_context(|| at("cannot make", &home))?;
    // One process converts; another that wants the same waits for it.
    let lock = home.join("lock");
    let lock = File::create(&lock).with_context(|| at("cannot write", &lock))?;
    lock.lock().context("cannot lock the FP8 copy")?;
    if copy.is_dir() {
        return Ok(copy);
    }
    let part = home.join("part");
    let clear = || match fs::remove_dir_all(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    clear().with_context(|| at("cannot remove", &part))?;
    fs::create_dir(&part).with_context(|| at("cannot make", &part))?;
    let made = convert(&checkpoint, &part, threads, console, stop);
    let report = match made {
        Ok(report) => report,
        Err(error) => {
            // The error matters more than what could not be removed.
            let _ = clear();
            return Err(match error {
                QuantizeError::Io { .. } => error.into(),
                QuantizeError::Interrupted => Interrupted.into(),
                _ => BadCheckpoint(format!("--weights fp8: {error}")).into(),
            });
        }
    };
    fs::rename(&part, &copy).with_context(|| at("cannot rename", &part))?;
    console.notice(&told(&report, &copy));
    Ok(copy)
}

fn told(report: &Quantized, copy: &Path) -> String {
    let (before, after) = report.bytes;
    let worst = report.worst.as_ref().map_or(String::new(), |(name, error)| {
        format!(", at most {:.2} % ({name})", 100.0 * error)
    });
    format!(
        "{} projections stored as fp8, {} instead of {}; error against the stored weights {:.2} % rms{worst}; kept in {}",
        report.matrices,
        HumanBytes(after),
        HumanBytes(before),
        100.0 * report.error,
        copy.display()
    )
}

fn convert(
    checkpoint: &Checkpoint,
    to: &Path,
    threads: usize,
    console: &Console,
    stop: &AtomicBool,
) -> Result<Quantized, QuantizeError> {
    console.notice("storing projections as fp8, once for this checkpoint");
    let bar = match console.has_bars() {
        true => console.bars().add(ProgressBar::new(checkpoint.bytes() as u64)),
        false => ProgressBar::hidden(),
    };
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {bytes} of {total_bytes}, {eta}") {
        bar.set_style(style);
    }
    let compute = Compute::new(Isa::detect(), threads);
    let made = checkpoint.quantize(to, &compute, &mut |done, _| {
        bar.set_position(done);
        !stop.load(Ordering::Relaxed)
    });
    bar.finish_and_clear();
    made
}

/// A name for what is in `source` now. The checkpoint's digest does not look into
/// the weights, so place, size and time of the files stand for them.
fn identity(source: &Path, checkpoint: &Checkpoint) -> anyhow::Result<String> {
    let mut hash = Sha256::new();
    hash.update(checkpoint.digest());
    hash.update(source.as_os_str().as_encoded_bytes());
    let mut files = fs::read_dir(source)?.collect::<Result<Vec<_>, _>>()?;
    files.sort_by_key(fs::DirEntry::file_name);
    for file in files {
        let about = fs::metadata(file.path())?;
        let changed = about.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        hash.update(file.file_name().as_encoded_bytes());
        hash.update([0]);
        hash.update(about.len().to_le_bytes());
        hash.update(changed.as_nanos().to_le_bytes());
    }
    Ok(hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh::telemetry::LogFormat;

    fn tiny() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/plain")
    }

    #[test]
    fn a_copy_is_made_once_and_one_cut_short_leaves_nothing() {
        let base = std::env::temp_dir().join(format!("moemesh-weights-{}", std::process::id()));
        let console = Console::quiet(LogFormat::Text);
        let stopped = AtomicBool::new(true);
        let error = fp8_copy(&tiny(), &base, 1, &console, &stopped).unwrap_err();
        assert!(error.is::<Interrupted>(), "{error}");
        let go_on = AtomicBool::new(false);
        let copy = fp8_copy(&tiny(), &base, 1, &console, &go_on).unwrap();
        assert!(copy.ends_with("plain-fp8"), "{}", copy.display());
        let home = copy.parent().unwrap();
        let mut names: Vec<_> =
            fs::read_dir(home).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["lock", "plain-fp8"]);
        let made = |copy: &Path| fs::metadata(copy).unwrap().modified().unwrap();
        let first = made(&copy);
        // Found, not made again: stopping has nothing to stop.
        let again = fp8_copy(&tiny(), &base, 1, &console, &stopped).unwrap();
        assert_eq!((made(&again), &again), (first, &copy));

        let error = fp8_copy(&copy, &base, 1, &console, &go_on).unwrap_err();
        assert!(error.is::<BadCheckpoint>() && error.to_string().contains("already"), "{error}");
        fs::remove_dir_all(base).unwrap();
    }
}
