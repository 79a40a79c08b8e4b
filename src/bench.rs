//! `moemesh bench`: numbers that anybody can print again. [`text`] measures
//! decode and prefill over HTTP, in a closed loop: every stream asks again when
//! its answer is complete. Percentiles are of requests, not of averages.

pub mod checkpoint;
mod report;

use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::bench::report::{Report, Row};
use crate::cli::BenchTextArgs;
use crate::client::ClientError;
use crate::client::http::Server;
use crate::client::openai::{Ask, Prompt, Summary, complete, first_model};
use crate::config::local::Local;
use crate::generate::with_quiet_mesh;

/// Tokens of the prompts that measure decode: too few to matter.
const DECODE_PROMPT: usize = 16;

/// Measures a server, or a mesh of its own, and prints the table.
pub async fn text(args: BenchTextArgs) -> anyhow::Result<()> {
    let report = match &args.url {
        Some(url) => {
            let server = Server::from_url(url, args.api_key.clone())?;
            let model = args.mesh.model.as_ref().map(|name| name.display().to_string());
            measure(&server, model, url.clone(), &args).await?
        }
        None => {
            let local = Local::for_one_command(&args.mesh)?;
            let shape = report::shape(&local);
            with_quiet_mesh(&local, async |server| measure(&server, None, shape, &args).await)
                .await?
        }
    };
    print!("{}", if args.json { report.json() } else { report.markdown() });
    Ok(())
}

async fn measure(
    server: &Server,
    model: Option<String>,
    subject: String,
    args: &BenchTextArgs,
) -> anyhow::Result<Report> {
    let model = match model {
        Some(model) => model,
        None => first_model(server).await?,
    };
    let load = Load { server, model: &model, vocab: args.vocab.max(2) };
    // The first request pays for pages and connections that later ones find ready.
    load.request(0, DECODE_PROMPT, args.decode_tokens).await.context("warm-up")?;

    let mut rows = Vec::new();
    for &streams in &args.streams {
        rows.push(load.decode(streams.max(1), args.requests.max(1), args.decode_tokens).await?);
    }
    rows.push(load.prefill(args.requests.max(1), args.prefill_tokens.max(1)).await?);
    Ok(Report { subject, model, rows })
}

struct Load<'a> {
    server: &'a Server,
    model: &'a str,
    vocab: u32,
}

impl Load<'_> {
    async fn decode(&self, streams: usize, requests: usize, tokens: u32) -> anyhow::Result<Row> {
        let began = Instant::now();
        let mut running = tokio::task::JoinSet::new();
        for stream in 0..streams {
            let (server, asks): (Server, Vec<Ask>) = (
                self.server.clone(),
                (0..requests)
                    .map(|n| {
                        self.ask(
                            1 + (streams * requests + stream * requests + n) as u64,
                            DECODE_PROMPT,
                            tokens,
                        )
                    })
                    .collect(),
            );
            running.spawn(async move {
                let mut done = Vec::with_capacity(asks.len());
                for ask in asks {
                    done.push(complete::<ClientError>(&server, &ask, |_| Ok(())).await?);
                }
                Ok::<_, ClientError>(done)
            });
        }
        let mut done: Vec<Summary> = Vec::new();
        while let Some(stream) = running.join_next().await {
            done.extend(stream.context("a stream of the benchmark failed")??);
        }
        let wall = began.elapsed();
        let generated: u64 = done.iter().map(|summary| summary.completion_tokens).sum();
        Ok(Row {
            what: format!("decode, {tokens} tokens each"),
            streams,
            rate: generated as f64 / wall.as_secs_f64(),
            first: done.iter().map(|summary| summary.first).collect(),
            per_token: done.iter().filter_map(Summary::per_token).collect(),
        })
    }

    async fn prefill(&self, requests: usize, tokens: usize) -> anyhow::Result<Row> {
        let mut first: Vec<Duration> = Vec::new();
        for request in 0..requests {
            first.push(self.request(1 << 32 | request as u64, tokens, 1).await?.first);
        }
        let spent: Duration = first.iter().sum();
        Ok(Row {
            what: format!("prefill, {tokens} tokens each"),
            streams: 1,
            rate: (requests * tokens) as f64 / spent.as_secs_f64(),
            first,
            per_token: Vec::new(),
        })
    }

    async fn request(&self, key: u64, prompt: usize, tokens: u32) -> Result<Summary, ClientError> {
        complete(self.server, &self.ask(key, prompt, tokens), |_| Ok(())).await
    }

    fn ask(&self, key: u64, prompt: usize, tokens: u32) -> Ask {
        Ask {
            model: self.model.to_owned(),
            prompt: Prompt::Tokens(ids(key, prompt, self.vocab)),
            max_tokens: tokens,
            temperature: Some(0.0),
            seed: None,
            ignore_eos: true,
        }
    }
}

/// Token ids that are the same in every run and of which no two keys share a
/// prefix, so that no cache helps (splitmix64).
fn ids(key: u64, count: usize, vocab: u32) -> Vec<u32> {
    let mut state = key.wrapping_mul(0xd134_2543_de82_ef95);
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    (0..count).map(|_| (next() % u64::from(vocab)) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_differ_between_requests_and_not_between_runs() {
        assert_eq!(ids(1, 16, 256), ids(1, 16, 256));
        assert_ne!(ids(1, 16, 256)[..4], ids(2, 16, 256)[..4]);
        assert!(ids(3, 1000, 7).iter().all(|&id| id < 7));
    }
}
