//! One layer through gRPC: this process dispatches and gathers as a router does, an expert node of its own process owns
//! all experts of a checkpoint and computes them, on a GPU or on CPUs.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use kernels::cuda::{Arena, Gpu, GroupedFfn, Layout, Piece, Row};
use mesh::link::Identity;
use mesh::near::Shortcut;
use mesh::transport::Endpoint;
use model::Device;
use model::rows::{NodeSum, encode_fp8, fp8_row_bytes};
use model::{
    Checkpoint, Compute, Expert, ExpertDevice, ExpertGroup, ExpertScratch, Isa, Numerics, Routed,
    forward_experts, together,
};
use proto::LayerId;
use proto::v1::Dtype;
use router::exchange::{Combine, Shape, Wire};
use router::measure::{Config, Dispatcher};
use tokio::runtime::Runtime;

use super::{rows, values};
use crate::bench::report::machine;
use crate::bench::stats::{Random, Times};
use crate::cli::BenchDeviceArgs;
use crate::client::http::Server;
use crate::up::runtime_dir::RuntimeDir;

const NUMERICS: Numerics = Numerics::Bf16;
/// Reading and copying all experts of a large layer takes its time.
const READY_WITHIN: Duration = Duration::from_secs(300);
/// ‖results − the CPU's‖ / ‖the CPU's‖ that is let pass: FP8 activations are off by a few percent.
const TOLERANCE: f64 = 0.1;

/// The node; ends with this value.
struct Node {
    process: Child,
    side: Server,
    endpoint: Endpoint,
    runtime: Runtime,
    _dir: RuntimeDir,
}

/// What the node says of itself, summed since it started.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    frames: f64,
    queue: f64,
    batches: f64,
    compute: f64,
}

impl Node {
    fn start(args: &BenchDeviceArgs, model: &Path) -> anyhow::Result<Node> {
        let dir = RuntimeDir::create().context("cannot make a directory for sockets")?;
        let socket = |name: &str| Endpoint::Unix(dir.path().join(name));
        let (listen, admin) = (socket("node.sock"), socket("node.admin.sock"));
        let settings = [
            format!("listen={listen}"),
            format!("admin={admin}"),
            format!("model_dir={}", model.display()),
            format!("numerics={NUMERICS}"),
            format!("device={}", args.device),
            format!("threads={}", args.threads),
            "log_filter=error".to_owned(),
        ];
        let process = Command::new(std::env::current_exe()?)
            .args(["expert-node", "--die-with-parent"])
            .args(settings.iter().flat_map(|setting| ["--set", setting]))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start the expert node")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let side = Server::at(admin);
        let mut node = Node { process, side, endpoint: listen, runtime, _dir: dir };
        let began = Instant::now();
        loop {
            let reason = match node.runtime.block_on(node.side.readiness()) {
                Ok(Ok(())) => return Ok(node),
                Ok(Err(reason)) => reason,
                Err(error) => error.to_string(),
            };
            if let Some(status) = node.process.try_wait()? {
                bail!("the expert node ended while it started: {status}");
            }
            ensure!(began.elapsed() < READY_WITHIN, "the expert node is not ready: {reason}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn told(&self) -> anyhow::Result<Told> {
        let (_, metrics) = self.runtime.block_on(self.side.get("/metrics"))?;
        let series = |name: &str| -> anyhow::Result<f64> {
            let name = format!("expert_node_{name} ");
            let value = metrics.lines().find_map(|line| line.split_once(&name));
            let (_, value) = value.with_context(|| format!("the node does not say its {name}"))?;
            Ok(value.parse()?)
        };
        Ok(Told {
            frames: series("queue_seconds_count")?,
            queue: series("queue_seconds_sum")?,
            batches: series("compute_seconds_count")?,
            compute: series("compute_seconds_sum")?,
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        // Nothing is left of it that could be asked why.
        let _ = self.process.wait();
    }
}

/// The layer that is measured, and what it is measured with.
struct Layer {
    checkpoint: Arc<Checkpoint>,
    layer: usize,
    hidden: usize,
    experts: usize,
    top_k: usize,
    compute: Compute,
}

/// Rows and the experts that they go to.
struct Work {
    rows: Vec<u8>,
    experts: Vec<u32>,
    weights: Vec<f32>,
}

/// Measures, and prints a table, each line when it is there. The dispatcher drives a runtime of its own, so it gets a
/// thread that has none.
pub fn measure(args: &BenchDeviceArgs, model: &Path) -> anyhow::Result<()> {
    let measured = std::thread::scope(|scope| scope.spawn(|| measure_here(args, model)).join());
    measured.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn measure_here(args: &BenchDeviceArgs, model: &Path) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(model)?;
    let config = checkpoint.config();
    let (hidden, experts, top_k) = (config.hidden, config.experts, config.top_k);
    let layer = config
        .moe_layers()
        .next()
        .with_context(|| format!("{} has no layer with experts", model.display()))?;
    let compute = Compute::new(Isa::detect(), args.threads);
    let layer = Layer { checkpoint, layer, hidden, experts, top_k, compute };
    let began = Instant::now();
    let node = Node::start(args, model)?;
    println!(
        "layer {} of {}, {experts} experts, on {} of {}; the node was ready after {:.1} s\n\n\
         | wire | rows | round trip ms, p50 / p95 / p99 | mean, us | to the node and back | in its queue \
         | computed | combined |\n|---|---|---|---|---|---|---|---|",
        layer.layer,
        model.display(),
        args.device,
        machine(),
        began.elapsed().as_secs_f64()
    );
    let mut random = Random::new(args.seed.unwrap_or(1));
    for (name, wire) in [("exact", Wire::Exact), ("fp8", Wire::Fp8)] {
        let mut dispatcher = layer.dispatcher(args, &node, wire)?;
        layer.warm(&mut dispatcher, &mut random)?;
        layer.check(&mut dispatcher, &mut random)?;
        for &count in &args.tokens {
            ensure!(count > 0, "--tokens 0: at least one");
            let line = layer.trips(&mut dispatcher, &node, (count, args.rounds), &mut random)?;
            println!("| {name} | {count} | {line} |");
        }
    }
    drop(node);
    if let Device::Cuda(ordinal) = args.device {
        layer.stages(ordinal, &args.tokens, &mut random)?;
    }
    Ok(())
}

impl Layer {
    fn dispatcher(
        &self,
        args: &BenchDeviceArgs,
        node: &Node,
        wire: Wire,
    ) -> anyhow::Result<Dispatcher> {
        let device = match args.device {
            Device::Cpu => ExpertDevice::Cpu,
            Device::Cuda(_) => ExpertDevice::Cuda,
        };
        let hidden = self.hidden as u32;
        Dispatcher::connect(Config {
            nodes: vec![node.endpoint.clone()],
            identity: Identity {
                model_digest: self.checkpoint.digest().to_vec(),
                numerics: device.class(NUMERICS, Isa::detect(), &self.checkpoint)?,
                hidden,
            },
            shape: Shape {
                hidden,
                dtype: Dtype::Bf16,
                top_k: self.top_k as u32,
                wire,
                combine: Combine::Router,
            },
            layer: LayerId(self.layer as u32),
            experts: self.experts as u32,
            shared_rows: Shortcut::Auto,
        })
        .map_err(|missing| anyhow!("the expert node cannot be reached: {missing}"))
    }

    /// `count` random rows, each for `top_k` experts drawn anew.
    fn work(&self, count: usize, random: &mut Random) -> Work {
        let experts = (0..count).flat_map(|_| {
            let mut chosen: Vec<u32> = Vec::new();
            while chosen.len() < self.top_k {
                let expert = random.below(self.experts as u64) as u32;
                if !chosen.contains(&expert) {
                    chosen.push(expert);
                }
            }
            chosen.sort_unstable();
            chosen
        });
        let experts = experts.collect();
        let weights = vec![1.0 / self.top_k as f32; count * self.top_k];
        Work { rows: rows(count, self.hidden, random), experts, weights }
    }

    fn routed<'a>(&self, work: &'a Work) -> Routed<'a> {
        let Work { rows, experts, weights } = work;
        Routed { rows, count: experts.len() / self.top_k, top_k: self.top_k, experts, weights }
    }

    /// Rows for every expert, so that all are read and, on a GPU, brought there.
    fn warm(&self, dispatcher: &mut Dispatcher, random: &mut Random) -> anyhow::Result<()> {
        let count = self.experts / self.top_k;
        let mut work = self.work(count, random);
        work.experts = (0..(count * self.top_k) as u32).collect();
        for _ in 0..2 {
            dispatcher.round_trip(&self.routed(&work))?;
        }
        Ok(())
    }

    /// Some rows beside what this process computes of them on its CPU.
    fn check(&self, dispatcher: &mut Dispatcher, random: &mut Random) -> anyhow::Result<()> {
        let work = self.work(2, random);
        dispatcher.round_trip(&self.routed(&work))?;
        let (mut got, mut expected) = (Vec::new(), Vec::new());
        let (mut out, mut scratch) = (Vec::new(), ExpertScratch::default());
        for (slot, &expert) in work.experts.iter().enumerate() {
            let expert = Expert::load(&self.checkpoint, self.layer, expert as usize)?;
            let group = ExpertGroup { expert: &expert, rows: 1 };
            let x = &work.rows[slot / self.top_k * 2 * self.hidden..][..2 * self.hidden];
            let x = together(x, 2 * self.hidden);
            forward_experts(&self.compute, NUMERICS, &[group], &x, &mut out, &mut scratch);
            expected.extend(values(&out).into_iter().map(f64::from));
            got.extend(values(dispatcher.row(slot)));
        }
        let off = kernels::cuda::reference::distance(&got, &expected);
        ensure!(off <= TOLERANCE, "results are off by {off:.2e}, {TOLERANCE} is let pass");
        Ok(())
    }

    /// Round trips of `count` rows, and where their time goes.
    fn trips(
        &self,
        dispatcher: &mut Dispatcher,
        node: &Node,
        (count, rounds): (usize, usize),
        random: &mut Random,
    ) -> anyhow::Result<String> {
        let (mut times, mut combined) = (Vec::new(), Duration::ZERO);
        let (mut sum, mut row) = (NodeSum::default(), vec![0; 2 * self.hidden]);
        let rounds = rounds.max(1);
        let before = node.told()?;
        for _ in 0..rounds {
            let work = self.work(count, random);
            let routed = self.routed(&work);
            let start = Instant::now();
            dispatcher.round_trip(&routed)?;
            times.push(start.elapsed());
            let start = Instant::now();
            for slots in (0..count).map(|token| token * self.top_k..(token + 1) * self.top_k) {
                let weighted = slots.map(|slot| (dispatcher.row(slot), work.weights[slot]));
                sum.row(self.compute.kernels, NUMERICS, weighted, &mut row);
            }
            combined += start.elapsed();
        }
        let after = node.told()?;
        let mean = times.iter().sum::<Duration>().as_secs_f64() / rounds as f64;
        let queue = (after.queue - before.queue) / (after.frames - before.frames).max(1.0);
        let compute = (after.compute - before.compute) / (after.batches - before.batches).max(1.0);
        let combined = combined.as_secs_f64() / rounds as f64;
        let us = [mean, mean - queue - compute, queue, compute, combined];
        let us = us.map(|seconds| format!("{:.0}", seconds * 1e6));
        Ok(format!("{} | {}", Times::new(times).fine(), us.join(" | ")))
    }

    /// What "computed" is on the GPU: the same batches here, each stage by itself.
    fn stages(&self, ordinal: usize, tokens: &[usize], random: &mut Random) -> anyhow::Result<()> {
        let gpu = Gpu::open(ordinal)?;
        let layout = Layout::new(self.checkpoint.expert_shape(self.layer)??);
        let arena = Arc::new(Arena::new(&gpu, layout, self.experts)?);
        let mut packed = gpu.pin("an expert", layout.bytes)?;
        for slot in 0..self.experts {
            let expert = Expert::load(&self.checkpoint, self.layer, slot)?;
            layout.pack(&expert.mats(), &mut packed)?;
            arena.fill(slot as u32, &packed)?;
        }
        let most = tokens.iter().max().map_or(1, |count| count * self.top_k);
        let mut ffn = GroupedFfn::new(arena, most)?;
        println!("\n| wire | rows | packed, us | copied in | computed | copied out |");
        println!("|---|---|---|---|---|---|");
        for fp8 in [false, true] {
            for &count in tokens {
                let work = self.work(count, random);
                let mut coded = Vec::new();
                encode_fp8(NUMERICS, &work.rows, self.hidden, &mut coded);
                let (x, width) = match fp8 {
                    true => (&coded, fp8_row_bytes(self.hidden)),
                    false => (&work.rows, 2 * self.hidden),
                };
                // The slots by expert, as a node has them.
                let mut order: Vec<usize> = (0..work.experts.len()).collect();
                order.sort_by_key(|&slot| work.experts[slot]);
                let row = |place: usize| {
                    let id = order[place] / self.top_k;
                    Row { id, fp8, bytes: &x[id * width..][..width] }
                };
                let mut end = 0;
                let pieces: Vec<Piece> = order
                    .chunk_by(|&a, &b| work.experts[a] == work.experts[b])
                    .map(|slots| {
                        end += slots.len();
                        Piece { slot: work.experts[slots[0]], rows: end - slots.len()..end }
                    })
                    .collect();
                let took = ffn.time(&pieces, &row, 20)?;
                let us = [took.pack, took.copy_in, took.compute, took.copy_out];
                let us = us.map(|seconds| format!("{:.0}", seconds * 1e6)).join(" | ");
                let wire = if fp8 { "fp8" } else { "exact" };
                println!("| {wire} | {count} | {us} |");
            }
        }
        Ok(())
    }
}
