//! Writes a checkpoint's projections as block-scaled FP8, as DeepSeek publishes its own: e4m3 codes
//! in blocks of 128 × 128 with one f32 scale each (DeepSeek-V3 report, section 3.3.2). Embedding,
//! head, norms and gate keep their type. The result is a checkpoint like any other, so nothing else
//! has to know where it came from. Each weight is read once, and one weight at a time is in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use kernels::{Compute, Mat};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::blocks::{Squares, quantize};
use super::{Checkpoint, Dtype, Entry, INDEX};
use crate::parallel::for_each;

/// Rows and columns that share a scale.
const BLOCK: usize = 128;
/// Files of more bytes are weights or of no use to a server.
const MAX_SIDE_FILE: u64 = 64 << 20;

/// Why a checkpoint was not written.
#[derive(Debug, thiserror::Error)]
pub enum QuantizeError {
    /// Its weights are in FP8 as they are.
    #[error("{0} has FP8 weights already")]
    Already(String),
    /// No matrix that would be stored in FP8 has a type to start from.
    #[error("{0} has no bf16 or f32 projections to store in FP8")]
    Nothing(String),
    /// A weight that FP8 cannot hold.
    #[error("{file}: tensor {tensor} holds a value that is not finite")]
    NotFinite {
        /// File of the weight.
        file: String,
        /// Its name.
        tensor: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Whoever asked for it does not want it any more.
    #[error("interrupted")]
    Interrupted,
}

/// What was written and how far it is from what was read.
#[derive(Clone, Debug, Default)]
pub struct Quantized {
    /// Matrices now in FP8.
    pub matrices: usize,
    /// Bytes of the weights before and after.
    pub bytes: (u64, u64),
    /// `‖fp8 − w‖ / ‖w‖` over all of them.
    pub error: f64,
    /// The matrix with the largest error of its own, and that error.
    pub worst: Option<(String, f64)>,
}

impl Checkpoint {
    /// Writes the checkpoint with FP8 projections into the empty directory `to`. `progress` hears
    /// how many of how many bytes were read, and stops the work by returning false.
    pub fn quantize(
        &self,
        to: &Path,
        compute: &Compute,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Quantized, QuantizeError> {
        if self.config.fp8_block.is_some() {
            return Err(QuantizeError::Already(self.dir.display().to_string()));
        }
        if !self.tensors.iter().any(|(name, entry)| becomes_fp8(name, entry)) {
            return Err(QuantizeError::Nothing(self.dir.display().to_string()));
        }
        let all = self.bytes() as u64;
        let mut job = Job {
            checkpoint: self,
            compute,
            done: 0,
            all,
            progress,
            out: Quantized::default(),
            squares: Squares::default(),
        };
        let mut index = BTreeMap::new();
        for file in 0..self.shards.len() {
            job.shard(file, to, &mut index)?;
        }
        if self.shards.len() > 1 {
            let text = json!({ "metadata": {}, "weight_map": index }).to_string();
            write(&to.join(INDEX), text.as_bytes())?;
        }
        self.side_files(to)?;
        job.out.error = job.squares.relative().unwrap_or(0.0);
        Ok(job.out)
    }

    /// The configuration, which now says FP8, and whatever else a server reads.
    fn side_files(&self, to: &Path) -> Result<(), QuantizeError> {
        let path = self.dir.join("config.json");
        let text = fs::read_to_string(&path).map_err(io(&path))?;
        let mut config: Value = serde_json::from_str(&text).map_err(|e| io(&path)(e.into()))?;
        config["quantization_config"] = json!({
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        });
        write(&to.join("config.json"), format!("{config:#}\n").as_bytes())?;
        for entry in fs::read_dir(&self.dir).map_err(io(&self.dir))? {
            let entry = entry.map_err(io(&self.dir))?;
            let (path, name) = (entry.path(), entry.file_name());
            let kind = path.extension().and_then(|e| e.to_str());
            let wanted = matches!(kind, Some("json" | "jinja" | "model" | "txt"))
                && name != "config.json"
                && name != INDEX;
            let size = entry.metadata().map_err(io(&path))?.len();
            if wanted && path.is_file() && size <= MAX_SIDE_FILE {
                fs::copy(&path, to.join(&name)).map_err(io(&path))?;
            }
        }
        Ok(())
    }
}

/// The projections, in the naming of published checkpoints.
fn becomes_fp8(name: &str, entry: &Entry) -> bool {
    let projection = name.ends_with("_proj.weight") || name.ends_with("_proj_with_mqa.weight");
    projection && entry.shape.len() == 2 && matches!(entry.dtype, Dtype::F32 | Dtype::Bf16)
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> QuantizeError + use<> {
    let path: PathBuf = path.to_owned();
    move |source| QuantizeError::Io { path: path.display().to_string(), source }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), QuantizeError> {
    fs::write(path, bytes).map_err(io(path))
}

struct Job<'a> {
    checkpoint: &'a Checkpoint,
    compute: &'a Compute,
    done: u64,
    all: u64,
    progress: &'a mut dyn FnMut(u64, u64) -> bool,
    out: Quantized,
    squares: Squares,
}

impl Job<'_> {
    /// Writes one file under the name that it had.
    fn shard(
        &mut self,
        file: usize,
        to: &Path,
        index: &mut BTreeMap<String, String>,
    ) -> Result<(), QuantizeError> {
        let source = Path::new(&self.checkpoint.shards[file].path);
        let name = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // In the order in which they lie in the source, which is then read from end to end.
        let tensors: BTreeSet<(usize, &str)> = self
            .checkpoint
            .tensors
            .iter()
            .filter(|(_, entry)| entry.span.file as usize == file)
            .map(|(name, entry)| (entry.span.start, name.as_str()))
            .collect();
        let mut header = serde_json::Map::new();
        let mut end = 0;
        let mut place = |tensor: &str, dtype: &str, shape: &[usize], bytes: usize| {
            index.insert(tensor.to_owned(), name.clone());
            let offsets = [end, end + bytes];
            end += bytes;
            header.insert(
                tensor.to_owned(),
                json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets }),
            );
        };
        for (_, tensor) in &tensors {
            let entry = &self.checkpoint.tensors[*tensor];
            if becomes_fp8(tensor, entry) {
                let (n, k) = (entry.shape[0], entry.shape[1]);
                let scales = [n.div_ceil(BLOCK), k.div_ceil(BLOCK)];
                place(tensor, "F8_E4M3", &entry.shape, n * k);
                place(&format!("{tensor}_scale_inv"), "F32", &scales, scales[0] * scales[1] * 4);
            } else {
                place(tensor, &entry.dtype.to_string(), &entry.shape, entry.span.len);
            }
        }
        let mut text = Value::Object(header).to_string().into_bytes();
        // Readers may want the tensors at a multiple of eight.
        text.resize(text.len().next_multiple_of(8), b' ');

        let path = to.join(&name);
        let failed = io(&path);
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(&failed)?);
        out.write_all(&(text.len() as u64).to_le_bytes()).map_err(&failed)?;
        out.write_all(&text).map_err(&failed)?;
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for (_, tensor) in &tensors {
            let entry = &self.checkpoint.tensors[*tensor];
            let bytes = self.checkpoint.span(entry.span);
            if becomes_fp8(tensor, entry) {
                self.matrix(tensor, entry, &mut codes, &mut scales)?;
                out.write_all(&codes).map_err(&failed)?;
                for scale in &scales {
                    out.write_all(&scale.to_le_bytes()).map_err(&failed)?;
                }
            } else {
                out.write_all(bytes).map_err(&failed)?;
                self.out.bytes.1 += bytes.len() as u64;
            }
            self.out.bytes.0 += bytes.len() as u64;
            self.done += bytes.len() as u64;
            if !(self.progress)(self.done, self.all) {
                return Err(QuantizeError::Interrupted);
            }
        }
        let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
        file.sync_all().map_err(failed)
    }

    fn matrix(
        &mut self,
        name: &str,
        entry: &Entry,
        codes: &mut Vec<u8>,
        scales: &mut Vec<f32>,
    ) -> Result<(), QuantizeError> {
        let (n, k) = (entry.shape[0], entry.shape[1]);
        let bytes = self.checkpoint.span(entry.span);
        let weight = match entry.dtype {
            Dtype::Bf16 => Mat::bf16(bytes, n, k),
            _ => Mat::f32(bytes, n, k),
        };
        // The span was checked against the shape when the file was opened.
        let weight = weight.unwrap_or_else(|e| panic!("{name}: {e}"));
        let width = k.div_ceil(BLOCK);
        codes.resize(n * k, 0);
        scales.resize(n.div_ceil(BLOCK) * width, 0.0);
        let squares = Mutex::new(Squares::default());
        let pieces = codes.chunks_mut((BLOCK * k).max(1)).zip(scales.chunks_mut(width.max(1)));
        for_each(
            &self.compute.pool,
            n.div_ceil(BLOCK),
            pieces.enumerate(),
            |(i, (codes, scales))| {
                let rows = weight.rows(i * BLOCK..n.min((i + 1) * BLOCK));
                let mut wide = vec![0.0f32; rows.n() * k];
                for (row, out) in wide.chunks_mut(k.max(1)).enumerate() {
                    rows.row_to_f32(row, out);
                }
                squares.lock().add(quantize(&wide, k, (BLOCK, BLOCK), codes, scales));
            },
        );
        let squares = squares.into_inner();
        if !squares.is_finite() {
            let file = self.checkpoint.shards[entry.span.file as usize].path.clone();
            return Err(QuantizeError::NotFinite { file, tensor: name.to_owned() });
        }
        self.squares.add(squares);
        self.out.matrices += 1;
        self.out.bytes.1 += (codes.len() + 4 * scales.len()) as u64;
        let worst = self.out.worst.as_ref().map_or(0.0, |(_, error)| *error);
        if let Some(error) = squares.relative().filter(|error| *error > worst) {
            self.out.worst = Some((name.to_owned(), error));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::Isa;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
    }

    fn target(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("moemesh-fp8-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn a_checkpoint_in_shards_comes_out_loadable_and_close() {
        let from = Checkpoint::open(fixture("yarn")).unwrap();
        let (dir, compute) = (target("yarn"), Compute::new(Isa::detect(), 2));
        let mut last = (0, 0);
        let report = from
            .quantize(&dir, &compute, &mut |done, all| {
                last = (done, all);
                true
            })
            .unwrap();
        let to = Checkpoint::open(&dir).unwrap();
        assert_eq!(to.config().fp8_block, Some((BLOCK, BLOCK)));
        assert_ne!(to.digest(), from.digest());
        assert!(last.0 > 0 && last.0 <= last.1);
        assert!(report.matrices > 10 && report.bytes.1 < report.bytes.0, "{report:?}");
        // Half a unit in the last place of three bits, evenly spread: about 2.6 %.
        assert!((0.015..0.035).contains(&report.error), "{report:?}");
        assert!(report.worst.is_some_and(|(_, error)| error >= report.error));
        for (name, entry) in &from.tensors {
            let (was, is) =
                (from.tensor(name, &entry.shape).unwrap(), to.tensor(name, &entry.shape).unwrap());
            match becomes_fp8(name, entry) {
                true => assert_eq!(is.dtype, &Dtype::F8E4m3, "{name}"),
                false => assert!(is.dtype == was.dtype && is.bytes == was.bytes, "{name}"),
            }
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn what_cannot_be_written_is_refused() {
        let compute = Compute::new(Isa::detect(), 1);
        let dir = target("refused");
        let fp8 = Checkpoint::open(fixture("fp8")).unwrap();
        let refused = fp8.quantize(&dir, &compute, &mut |_, _| true);
        assert!(matches!(refused, Err(QuantizeError::Already(_))));
        let plain = Checkpoint::open(fixture("plain")).unwrap();
        let stopped = plain.quantize(&dir, &compute, &mut |_, _| false);
        assert!(matches!(stopped, Err(QuantizeError::Interrupted)));
        let nowhere = plain.quantize(&dir.join("none"), &compute, &mut |_, _| true);
        assert!(matches!(nowhere, Err(QuantizeError::Io { .. })));
        fs::remove_dir_all(dir).unwrap();
    }
}
