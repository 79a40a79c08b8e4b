//! The rotary embedding's settings, resolved from either style of configuration to frequencies.
//!
//! The older style has `rope_theta` and `rope_scaling` at the top, the newer one `rope_parameters`.
//! Types `default`, `linear`, `llama3`, `yarn` and `dynamic` are known (`dynamic` only changes
//! positions beyond `max_position_embeddings`, which are refused anyway); others are refused by
//! name. Formulas: YaRN (Peng et al. 2023) section 3.2 to 3.4, as transformers writes them.

use std::f64::consts::PI;

use super::fields::Fields;
use crate::error::LoadError;

/// Rotary embedding, ready to use.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The type's name, for display: `default`, `linear`, `dynamic`, `llama3` or `yarn`.
    pub kind: &'static str,
    /// Base of the frequencies.
    pub theta: f64,
    /// Pairs are `(x[2i], x[2i+1])` if set, `(x[i], x[i + dim/2])` if not.
    pub interleave: bool,
    /// Angle per position for each pair, `[qk_rope / 2]`.
    pub inv_freq: Vec<f32>,
    /// Factor on cosine and sine (YaRN's attention factor).
    pub amplitude: f32,
    /// Factor on the attention scale (YaRN's mscale, squared).
    pub score_factor: f64,
}

/// `0.1 · m · ln(s) + 1` for a stretch `s` above 1 (YaRN section 3.4).
fn mscale(stretch: f64, m: f64) -> f64 {
    if stretch <= 1.0 { 1.0 } else { 0.1 * m * stretch.ln() + 1.0 }
}

impl Rope {
    /// Reads the settings for a rotary width `dim` (even) from the top-level fields of a config.
    pub(crate) fn resolve(
        top: &Fields<'_>,
        dim: usize,
        max_positions: usize,
    ) -> Result<Rope, LoadError> {
        // `rope_scaling` wins where a file has both, as in transformers.
        let scaling = top.object("rope_scaling")?;
        let set = match scaling {
            Some(set) => Some(set),
            None => top.object("rope_parameters")?,
        };
        let set = set.as_ref();
        let bounds = 1e-3..=1e15;
        let theta = match set.map_or(Ok(None), |s| s.float("rope_theta", bounds.clone()))? {
            Some(theta) => theta,
            None => top.float("rope_theta", bounds)?.unwrap_or(10_000.0),
        };
        let interleave = top.flag_or_null("rope_interleave", true)?;
        for fields in [Some(top), set].into_iter().flatten() {
            if fields.float("partial_rotary_factor", 0.0..=1.0)?.is_some_and(|f| f != 1.0) {
                return Err(fields.refuse("partial_rotary_factor", "only 1.0 is supported"));
            }
        }
        // Powers in f32, as the reference has them.
        let exponents = (0..dim / 2).map(|i| (2 * i) as f32 / dim as f32);
        let powers: Vec<f32> = exponents.map(|e| (theta.powf(f64::from(e))) as f32).collect();
        let plain: Vec<f32> = powers.iter().map(|p| 1.0 / p).collect();
        let base = Rope {
            kind: "default",
            theta,
            interleave,
            inv_freq: plain,
            amplitude: 1.0,
            score_factor: 1.0,
        };
        let Some(set) = set else { return Ok(base) };
        let kind = match set.text("rope_type")? {
            Some(kind) => kind,
            None => set.text("type")?.unwrap_or("default"),
        };
        let rope = match kind {
            "default" => return Ok(base),
            "linear" => linear(set, base)?,
            "dynamic" => dynamic(set, base, dim)?,
            "llama3" => llama3(top, set, base, max_positions)?,
            "yarn" => yarn(top, set, base, &powers, max_positions)?,
            other => {
                let shown: String = other.chars().take(40).collect();
                let field = if set.has("rope_type") { "rope_type" } else { "type" };
                return Err(set.refuse(
                    field,
                    format!(
                        "`{shown}` is not supported, only default, linear, dynamic, llama3, yarn"
                    ),
                ));
            }
        };
        if rope.inv_freq.iter().any(|f| !f.is_finite()) || !rope.amplitude.is_finite() {
            return Err(set.refuse("factor", "the settings give frequencies that are not finite"));
        }
        Ok(rope)
    }
}

fn stretch(set: &Fields<'_>) -> Result<f64, LoadError> {
    set.float("factor", 1e-3..=1e6)?.ok_or_else(|| set.refuse("factor", "missing"))
}

/// The attention scale's factor: any type but `default` takes it from `mscale_all_dim`.
fn score_factor(set: &Fields<'_>, factor: f64) -> Result<f64, LoadError> {
    let all_dim = set.float("mscale_all_dim", 0.0..=100.0)?.unwrap_or(0.0);
    let m = if all_dim == 0.0 { 1.0 } else { mscale(factor, all_dim) };
    Ok(m * m)
}

fn linear(set: &Fields<'_>, base: Rope) -> Result<Rope, LoadError> {
    let factor = stretch(set)?;
    let inv_freq = base.inv_freq.iter().map(|f| f / factor as f32).collect();
    Ok(Rope { kind: "linear", inv_freq, score_factor: score_factor(set, factor)?, ..base })
}

fn dynamic(set: &Fields<'_>, base: Rope, dim: usize) -> Result<Rope, LoadError> {
    let factor = stretch(set)?;
    if dim <= 2 {
        return Err(set.refuse("rope_type", "`dynamic` needs qk_rope_head_dim above 2"));
    }
    Ok(Rope { kind: "dynamic", score_factor: score_factor(set, factor)?, ..base })
}

/// The length the model was first trained at: a top-level value overrides the one in the set.
fn original(top: &Fields<'_>, set: &Fields<'_>, max_positions: usize) -> Result<f64, LoadError> {
    let bounds = 1..=(1 << 30);
    let field = "original_max_position_embeddings";
    let length = match top.int(field, bounds.clone())? {
        Some(length) => length,
        None => set.int(field, bounds)?.unwrap_or(max_positions),
    };
    Ok(length as f64)
}

fn llama3(
    top: &Fields<'_>,
    set: &Fields<'_>,
    base: Rope,
    max_positions: usize,
) -> Result<Rope, LoadError> {
    let factor = stretch(set)?;
    let need =
        |field: &str| set.float(field, 1e-3..=1e6)?.ok_or_else(|| set.refuse(field, "missing"));
    let (low, high) = (need("low_freq_factor")?, need("high_freq_factor")?);
    if high <= low {
        return Err(set.refuse("high_freq_factor", "has to be above low_freq_factor"));
    }
    let length = original(top, set, max_positions)?;
    let bend = |f: &f32| {
        let frequency = f64::from(*f);
        let wavelength = 2.0 * PI / frequency;
        if wavelength < length / high {
            *f
        } else if wavelength > length / low {
            (frequency / factor) as f32
        } else {
            let smooth = (length / wavelength - low) / (high - low);
            ((1.0 - smooth) * frequency / factor + smooth * frequency) as f32
        }
    };
    let inv_freq = base.inv_freq.iter().map(bend).collect();
    Ok(Rope { kind: "llama3", inv_freq, score_factor: score_factor(set, factor)?, ..base })
}

fn yarn(
    top: &Fields<'_>,
    set: &Fields<'_>,
    base: Rope,
    powers: &[f32],
    max_positions: usize,
) -> Result<Rope, LoadError> {
    if base.theta <= 1.0 {
        return Err(set.refuse("rope_theta", "yarn needs a base above 1"));
    }
    let length = original(top, set, max_positions)?;
    let factor = set.float("factor", 1e-3..=1e6)?.unwrap_or(max_positions as f64 / length);
    let optional = |field: &str| set.float(field, 0.0..=1e6).map(|v| v.filter(|v| *v != 0.0));
    let amplitude = match set.float("attention_factor", 0.0..=1e6)? {
        Some(given) => given,
        None => match (optional("mscale")?, optional("mscale_all_dim")?) {
            (Some(m), Some(all)) => mscale(factor, m) / mscale(factor, all),
            _ => mscale(factor, 1.0),
        },
    };
    let fast = optional("beta_fast")?.unwrap_or(32.0);
    let slow = optional("beta_slow")?.unwrap_or(1.0);
    let truncate = set.flag("truncate", true)?;

    let dim = (powers.len() * 2) as f64;
    // The pair that turns `turns` times within the original length (YaRN section 3.2).
    let pair = |turns: f64| dim * (length / (turns * 2.0 * PI)).ln() / (2.0 * base.theta.ln());
    let (mut low, mut high) = (pair(fast), pair(slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let blend = |(i, power): (usize, &f32)| {
        let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let keep = 1.0 - ramp;
        (1.0 / (factor as f32 * power)) * (1.0 - keep) + (1.0 / power) * keep
    };
    let inv_freq = powers.iter().enumerate().map(blend).collect();
    let score_factor = score_factor(set, factor)?;
    Ok(Rope { kind: "yarn", inv_freq, amplitude: amplitude as f32, score_factor, ..base })
}
