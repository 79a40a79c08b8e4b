//! The whole model, naively, as the papers write it: the oracle that tests compare the real thing
//! with.
//!
//! One token after the other, keys and values of every head spelled out, no pages, no absorbed
//! products, no kernels: f64 throughout, over the weights as stored. Slow, and meant to be read.
//! Nothing but tests calls this.

use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::config::{Config, LATENT_EPS};
use crate::error::LoadError;
use crate::expert::Expert;
use crate::weight::Weight;

/// What the model makes of a sequence.
pub struct Evaluated {
    /// `[tokens][vocab]`
    pub logits: Vec<Vec<f64>>,
    /// `[moe layers][tokens][top_k]`, ascending experts.
    pub experts: Vec<Vec<Vec<u32>>>,
}

type Rows = Vec<Vec<f64>>;

struct Model<'a> {
    checkpoint: &'a Arc<Checkpoint>,
    config: &'a Config,
}

/// Evaluates `tokens` with the model of `checkpoint`.
pub fn evaluate(checkpoint: &Arc<Checkpoint>, tokens: &[u32]) -> Result<Evaluated, LoadError> {
    let model = Model { checkpoint, config: checkpoint.config() };
    let config = model.config;
    let embedding = model.matrix("model.embed_tokens", config.vocab, config.hidden)?;
    let mut x: Rows = tokens.iter().map(|t| embedding[*t as usize].clone()).collect();
    let mut experts = Vec::new();
    for layer in 0..config.layers {
        let norm =
            model.vector(&format!("model.layers.{layer}.input_layernorm.weight"), config.hidden)?;
        let normed: Rows = x.iter().map(|x| rms_norm(x, &norm, config.rms_eps)).collect();
        add(&mut x, &model.attention(layer, &normed)?);
        let name = format!("model.layers.{layer}.post_attention_layernorm.weight");
        let norm = model.vector(&name, config.hidden)?;
        let normed: Rows = x.iter().map(|x| rms_norm(x, &norm, config.rms_eps)).collect();
        if config.is_moe(layer) {
            let (y, chosen) = model.moe(layer, &normed)?;
            add(&mut x, &y);
            experts.push(chosen);
        } else {
            let prefix = format!("model.layers.{layer}.mlp");
            add(&mut x, &model.ffn(&prefix, config.dense_intermediate, &normed)?);
        }
    }
    let norm = model.vector("model.norm.weight", config.hidden)?;
    let head = match config.tied {
        true => embedding,
        false => model.matrix("lm_head", config.vocab, config.hidden)?,
    };
    let logits = x.iter().map(|x| product(&head, &rms_norm(x, &norm, config.rms_eps))).collect();
    Ok(Evaluated { logits, experts })
}

impl Model<'_> {
    fn vector(&self, name: &str, n: usize) -> Result<Vec<f64>, LoadError> {
        Ok(self.checkpoint.vector(name, n)?.into_iter().map(f64::from).collect())
    }

    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<Rows, LoadError> {
        Ok(self.widen(self.checkpoint.matrix(&format!("{name}.weight"), n, k)?))
    }

    fn widen(&self, weight: Weight) -> Rows {
        let mat = weight.mat(self.checkpoint);
        let row = |i| {
            let mut row = vec![0.0; weight.k()];
            mat.row_to_f32(i, &mut row);
            row.into_iter().map(f64::from).collect()
        };
        (0..weight.n()).map(row).collect()
    }

    /// DeepSeek-V2 paper, eq. 37 to 47: keys and values of every head from the latent vector.
    fn attention(&self, layer: usize, x: &Rows) -> Result<Rows, LoadError> {
        let Config { hidden, heads, kv_lora, qk_nope, qk_rope, v_head, .. } = *self.config;
        let width = qk_nope + qk_rope;
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let bias = |part: &str, n: usize| match self.config.attention_bias {
            true => self.vector(&name(part), n),
            false => Ok(vec![0.0; n]),
        };
        let eps = LATENT_EPS;
        let queries: Rows = match self.config.q_lora {
            None => product_rows(&self.matrix(&name("q_proj"), heads * width, hidden)?, x),
            Some(rank) => {
                let norm = self.vector(&name("q_a_layernorm.weight"), rank)?;
                let mut low = product_rows(&self.matrix(&name("q_a_proj"), rank, hidden)?, x);
                let bias = bias("q_a_proj.bias", rank)?;
                low.iter_mut().for_each(|l| add_row(l, &bias));
                let low: Rows = low.iter().map(|l| rms_norm(l, &norm, eps)).collect();
                product_rows(&self.matrix(&name("q_b_proj"), heads * width, rank)?, &low)
            }
        };
        let down = self.matrix(&name("kv_a_proj_with_mqa"), kv_lora + qk_rope, hidden)?;
        let mut latent = product_rows(&down, x);
        let latent_bias = bias("kv_a_proj_with_mqa.bias", kv_lora + qk_rope)?;
        latent.iter_mut().for_each(|l| add_row(l, &latent_bias));
        let norm = self.vector(&name("kv_a_layernorm.weight"), kv_lora)?;
        let up = self.matrix(&name("kv_b_proj"), heads * (qk_nope + v_head), kv_lora)?;
        let expanded: Rows =
            latent.iter().map(|l| product(&up, &rms_norm(&l[..kv_lora], &norm, eps))).collect();
        let keys: Rows = (0..).zip(&latent).map(|(p, l)| self.rotate(&l[kv_lora..], p)).collect();

        let scale = f64::from(self.config.score_scale());
        let mut joined = vec![vec![0.0; heads * v_head]; x.len()];
        for (position, (query, out)) in queries.iter().zip(&mut joined).enumerate() {
            for head in 0..heads {
                let query = &query[head * width..(head + 1) * width];
                let rotated = self.rotate(&query[qk_nope..], position);
                let first = head * (qk_nope + v_head);
                let score = |p: usize| {
                    let nope = dot(&query[..qk_nope], &expanded[p][first..first + qk_nope]);
                    (nope + dot(&rotated, &keys[p])) * scale
                };
                let scores: Vec<f64> = (0..=position).map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for (p, weight) in weights.iter().enumerate() {
                    let values = &expanded[p][first + qk_nope..first + qk_nope + v_head];
                    let out = &mut out[head * v_head..(head + 1) * v_head];
                    out.iter_mut().zip(values).for_each(|(o, v)| *o += weight / sum * v);
                }
            }
        }
        let out = self.matrix(&name("o_proj"), hidden, heads * v_head)?;
        let out_bias = bias("o_proj.bias", hidden)?;
        let mut result = product_rows(&out, &joined);
        result.iter_mut().for_each(|r| add_row(r, &out_bias));
        Ok(result)
    }

    fn rotate(&self, x: &[f64], position: usize) -> Vec<f64> {
        let rope = &self.config.rope;
        let half = x.len() / 2;
        let mut out = x.to_vec();
        for (i, frequency) in rope.inv_freq.iter().enumerate() {
            let (a, b) = if rope.interleave { (2 * i, 2 * i + 1) } else { (i, i + half) };
            let (sin, cos) = (position as f64 * f64::from(*frequency)).sin_cos();
            let amplitude = f64::from(rope.amplitude);
            out[a] = (x[a] * cos - x[b] * sin) * amplitude;
            out[b] = (x[b] * cos + x[a] * sin) * amplitude;
        }
        out
    }

    fn ffn(&self, prefix: &str, inner: usize, x: &Rows) -> Result<Rows, LoadError> {
        let hidden = self.config.hidden;
        let gate = self.matrix(&format!("{prefix}.gate_proj"), inner, hidden)?;
        let up = self.matrix(&format!("{prefix}.up_proj"), inner, hidden)?;
        let down = self.matrix(&format!("{prefix}.down_proj"), hidden, inner)?;
        Ok(x.iter().map(|x| gated(&gate, &up, &down, x)).collect())
    }

    /// DeepSeek-V3 report, eq. 12 to 16, with groups.
    fn moe(&self, layer: usize, x: &Rows) -> Result<(Rows, Vec<Vec<u32>>), LoadError> {
        let Config { hidden, experts, .. } = *self.config;
        let prefix = format!("model.layers.{layer}.mlp");
        let gate = self.matrix(&format!("{prefix}.gate"), experts, hidden)?;
        let bias = self.vector(&format!("{prefix}.gate.e_score_correction_bias"), experts)?;
        let mut out = match self.config.shared_intermediate() {
            0 => vec![vec![0.0; hidden]; x.len()],
            inner => self.ffn(&format!("{prefix}.shared_experts"), inner, x)?,
        };
        let mut chosen = Vec::new();
        for (x, out) in x.iter().zip(&mut out) {
            let scores: Vec<f64> =
                product(&gate, x).into_iter().map(|s| 1.0 / (1.0 + (-s).exp())).collect();
            let mine = self.choose(&scores, &bias);
            let sum: f64 = mine.iter().map(|e| scores[*e as usize]).sum();
            for expert in &mine {
                let mut weight = scores[*expert as usize];
                if self.config.norm_topk {
                    weight /= sum;
                }
                weight *= f64::from(self.config.routed_scaling);
                let [gate, up, down] = Expert::load(self.checkpoint, layer, *expert as usize)?
                    .weights()
                    .map(|w| self.widen(w));
                let result = gated(&gate, &up, &down, x);
                out.iter_mut().zip(result).for_each(|(o, r)| *o += weight * r);
            }
            chosen.push(mine);
        }
        Ok((out, chosen))
    }

    fn choose(&self, scores: &[f64], bias: &[f64]) -> Vec<u32> {
        let Config { n_group, topk_group, top_k, .. } = *self.config;
        let size = scores.len() / n_group;
        let choice: Vec<f64> = scores.iter().zip(bias).map(|(s, b)| s + b).collect();
        let rank = |group: &usize| {
            let mut members = choice[group * size..(group + 1) * size].to_vec();
            members.sort_by(|a, b| b.total_cmp(a));
            members.iter().take(2).sum::<f64>()
        };
        let mut groups: Vec<usize> = (0..n_group).collect();
        groups.sort_by(|a, b| rank(b).total_cmp(&rank(a)));
        groups.truncate(topk_group);
        let mut eligible: Vec<u32> =
            (0..scores.len() as u32).filter(|e| groups.contains(&(*e as usize / size))).collect();
        eligible.sort_by(|a, b| choice[*b as usize].total_cmp(&choice[*a as usize]));
        eligible.truncate(top_k);
        eligible.sort_unstable();
        eligible
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn product(weight: &Rows, x: &[f64]) -> Vec<f64> {
    weight.iter().map(|w| dot(w, x)).collect()
}

fn product_rows(weight: &Rows, x: &Rows) -> Rows {
    x.iter().map(|x| product(weight, x)).collect()
}

fn gated(gate: &Rows, up: &Rows, down: &Rows, x: &[f64]) -> Vec<f64> {
    let gate = product(gate, x).into_iter().map(|g| g / (1.0 + (-g).exp()));
    let inner: Vec<f64> = gate.zip(product(up, x)).map(|(g, u)| g * u).collect();
    product(down, &inner)
}

fn rms_norm(x: &[f64], weight: &[f64], eps: f32) -> Vec<f64> {
    let mean = dot(x, x) / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

fn add_row(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn add(x: &mut Rows, y: &Rows) {
    x.iter_mut().zip(y).for_each(|(x, y)| add_row(x, y));
}
