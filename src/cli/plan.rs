//! Commands that plan a mesh before there is one.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
#[command(after_help = PLAN_EXAMPLES)]
pub struct PlanArgs {
    /// Memory by number of expert nodes, and the least number that fits
    #[arg(long, required = true)]
    pub fit: bool,
    /// Directory of a Hugging Face checkpoint; its config.json is enough [default: the
    /// bundled tiny model]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Memory of the device of a router or an expert node: bytes, or with a unit such as
    /// GB (10^9) or GiB (2^30)
    #[arg(long, value_name = "SIZE", default_value = "80GB", value_parser = size)]
    pub device_memory: u64,
    /// Share of it that weights and KV cache may take; the rest is for working memory
    #[arg(long, value_name = "SHARE", default_value_t = 0.9, value_parser = share)]
    pub memory_utilization: f64,
    /// Expert nodes that own each expert
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub replicas: u16,
    /// Numbers of expert nodes to show, such as 8,16 or 8-12 [default: powers of two up to
    /// what fits]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = counts)]
    pub nodes: Vec<RangeInclusive<u16>>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

const PLAN_EXAMPLES: &str = "\
Reads no weights. An expert node's share is what it starts with (`shard_count`, `shard_replicas`).

Examples:
  moemesh plan --fit --model deploy/shapes/deepseek-v3
  moemesh plan --fit --model deploy/shapes/deepseek-v3 --device-memory 141GB --replicas 2
  moemesh plan --fit --model /models/deepseek-v3 --nodes 8-16 --json";

/// Bytes from such as `80GB`, `79.6 GiB` or `85899345920`.
fn size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, f64); 9] = [
        ("KiB", 1024.0),
        ("MiB", 1_048_576.0),
        ("GiB", 1_073_741_824.0),
        ("TiB", 1_099_511_627_776.0),
        ("kB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
        ("TB", 1e12),
        ("B", 1.0),
    ];
    let unit = UNITS.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)));
    let (number, unit) = unit.unwrap_or((text, 1.0));
    let bytes = number.trim().parse::<f64>().map(|number| number * unit);
    match bytes {
        Ok(bytes) if (1.0..1e18).contains(&bytes) => Ok(bytes.round() as u64),
        _ => Err("not a size: write 80GB, 79.6GiB or a number of bytes".to_owned()),
    }
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse::<f64>().ok().filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "not a share above 0 and up to 1".to_owned())
}

fn counts(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.trim().parse(), last.trim().parse()) {
        (Ok(first), Ok(last)) if first >= 1 && first <= last => Ok(first..=last),
        _ => Err("not a number of nodes from 1, nor a range such as 8-12".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("80GB"), Ok(80_000_000_000));
        assert_eq!(size("1.5 GiB"), Ok(1_610_612_736));
        assert_eq!(size("512"), Ok(512));
        assert_eq!(size("7B"), Ok(7));
        for wrong in ["", "GB", "-1GB", "80 gigs", "inf", "NaN", "1e30"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn counts_of_nodes_are_numbers_or_ranges() {
        assert_eq!(counts("8"), Ok(8..=8));
        assert_eq!(counts("8-12"), Ok(8..=12));
        for wrong in ["", "0", "12-8", "8-", "a"] {
            assert!(counts(wrong).is_err(), "{wrong}");
        }
        assert!(share("0").is_err() && share("1.1").is_err() && share("1").is_ok());
    }
}
