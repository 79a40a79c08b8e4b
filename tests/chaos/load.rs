//! The load: streaming HTTP clients that never retry, over fixed prompts, greedy
//! and sampled, some with log-probabilities. What a stream says, but for ids and
//! times, is kept whole to be compared byte for byte.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::http::{self, Address, Events};

/// A client waits no longer than this for its next event.
const PATIENCE: Duration = Duration::from_secs(60);
const PROMPTS: [&str; 6] = [
    "Once upon a time",
    "The little dog ran to the park and",
    "Tom and Lily were friends. One day",
    "It was raining. The cat",
    "\"Why are you sad?\" asked the bird.",
    "There was a big red ball in the",
];

/// One request that is asked again and again.
pub struct Ask {
    pub path: &'static str,
    pub body: Value,
}

/// Twelve requests of `tokens` tokens each, every one with an answer of its own.
pub fn asks(tokens: usize) -> Vec<Ask> {
    let ask = |at: usize| {
        let prompt = PROMPTS[at % PROMPTS.len()];
        let mut body = json!({
            "model": "test", "max_tokens": tokens, "ignore_eos": true, "stream": true,
            "stream_options": { "include_usage": true }, "temperature": 0,
        });
        let mut set = |key: &str, value: Value| body[key] = value;
        if at >= PROMPTS.len() {
            set("temperature", json!(0.9));
            set("top_p", json!(0.95));
            set("seed", json!(at));
        }
        let chat = at % 4 == 3;
        match (at.is_multiple_of(3), chat) {
            (true, true) => {
                set("logprobs", json!(true));
                set("top_logprobs", json!(3));
            }
            (true, false) => set("logprobs", json!(3)),
            (false, _) => {}
        }
        let path = if chat {
            set("messages", json!([{ "role": "user", "content": prompt }]));
            "/v1/chat/completions"
        } else {
            set("prompt", json!(prompt));
            "/v1/completions"
        };
        Ask { path, body }
    };
    (0..2 * PROMPTS.len()).map(ask).collect()
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With `[DONE]`; everything that it said.
    Whole(String),
    /// By a status that tells the client to come back.
    Refused(u16),
    /// In any other way.
    Broken(String),
}

/// One request as its client saw it.
#[derive(Clone, Debug)]
pub struct Sample {
    pub ask: usize,
    /// Until the first event, or the refusal.
    pub first: Duration,
    /// Between two events.
    pub gaps: Vec<Duration>,
    pub outcome: Outcome,
}

/// Sends one request and reads its stream. `progress` counts its events.
pub async fn run(address: &Address, ask: usize, asks: &[Ask], progress: &AtomicUsize) -> Sample {
    let begun = Instant::now();
    let mut sample = Sample {
        ask,
        first: Duration::ZERO,
        gaps: Vec::new(),
        outcome: Outcome::Broken(String::new()),
    };
    progress.store(0, Ordering::Relaxed);
    let Ask { path, body } = &asks[ask];
    let response = match http::ask(address, path, body).await {
        Ok(response) => response,
        Err(error) => {
            sample.outcome = Outcome::Broken(format!("no answer: {error}"));
            return sample;
        }
    };
    let status = response.status().as_u16();
    sample.first = begun.elapsed();
    if status != 200 {
        let told = matches!(status, 429 | 503) && response.headers().contains_key("retry-after");
        sample.outcome = if told {
            Outcome::Refused(status)
        } else {
            Outcome::Broken(format!("status {status}"))
        };
        return sample;
    }
    sample.outcome = read(Events::of(response), &mut sample.gaps, progress).await;
    sample
}

async fn read(mut events: Events, gaps: &mut Vec<Duration>, progress: &AtomicUsize) -> Outcome {
    let mut said = String::new();
    let mut names: Option<(Value, Value)> = None;
    let mut last = Instant::now();
    let mut count = 0;
    loop {
        let event = match tokio::time::timeout(PATIENCE, events.next()).await {
            Ok(Some(event)) => event,
            Ok(None) => return Outcome::Broken(format!("cut after {count} events")),
            Err(_) => return Outcome::Broken(format!("silent after {count} events")),
        };
        if event == "[DONE]" {
            return Outcome::Whole(said);
        }
        let Ok(mut event) = serde_json::from_str::<Value>(&event) else {
            return Outcome::Broken(format!("no JSON: {event}"));
        };
        if event.get("error").is_some() {
            return Outcome::Broken(event["error"]["message"].to_string());
        }
        // They are the stream's own, and stay what they were.
        let own = (event["id"].take(), event["created"].take());
        if *names.get_or_insert_with(|| own.clone()) != own {
            return Outcome::Broken("its id or time changed".to_owned());
        }
        if count > 0 {
            gaps.push(last.elapsed());
        }
        last = Instant::now();
        count += 1;
        progress.store(count, Ordering::Relaxed);
        said.push_str(&event.to_string());
        said.push('\n');
    }
}

/// Which gateways get requests; those that are about to go are taken out first,
/// as a load balancer does.
pub struct Balancer {
    gateways: Vec<(Address, AtomicBool)>,
    next: AtomicUsize,
}

impl Balancer {
    pub fn new(addresses: &[Address]) -> Self {
        let gateways = addresses.iter().map(|a| (a.clone(), AtomicBool::new(true))).collect();
        Self { gateways, next: AtomicUsize::new(0) }
    }

    pub fn set(&self, gateway: usize, takes: bool) {
        self.gateways[gateway].1.store(takes, Ordering::Relaxed);
    }

    fn address(&self) -> &Address {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let all =
            (0..self.gateways.len()).map(|n| &self.gateways[(turn + n) % self.gateways.len()]);
        let mut taking = all.filter(|(_, takes)| takes.load(Ordering::Relaxed));
        &taking.next().expect("a gateway takes requests").0
    }
}

/// Clients that ask one request after the other until told to stop.
pub struct Clients {
    stop: Arc<AtomicBool>,
    /// Events of each client's current stream.
    pub progress: Arc<Vec<AtomicUsize>>,
    samples: Arc<Mutex<Vec<Sample>>>,
    tasks: JoinSet<()>,
}

impl Clients {
    pub fn start(count: usize, asks: Arc<Vec<Ask>>, balancer: Arc<Balancer>) -> Self {
        let (stop, samples) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let progress: Arc<Vec<AtomicUsize>> = Arc::new((0..count).map(|_| 0.into()).collect());
        let mut tasks = JoinSet::new();
        for client in 0..count {
            let (stop, samples) = (stop.clone(), samples.clone());
            let (asks, balancer, progress) = (asks.clone(), balancer.clone(), progress.clone());
            tasks.spawn(async move {
                let mut turn = client;
                while !stop.load(Ordering::Relaxed) {
                    let ask = turn % asks.len();
                    // Coprime to the number of requests, so each client asks them all.
                    turn += 5;
                    let sample = run(balancer.address(), ask, &asks, &progress[client]).await;
                    let refused = !matches!(sample.outcome, Outcome::Whole(_));
                    samples.lock().push(sample);
                    if refused {
                        // Not a retry: the next request, at the pace of one.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            });
        }
        Self { stop, progress, samples, tasks }
    }

    /// How many requests have ended.
    pub fn ended(&self) -> usize {
        self.samples.lock().len()
    }

    /// Which requests have been answered at least once.
    pub fn answered(&self) -> Vec<usize> {
        self.samples.lock().iter().map(|sample| sample.ask).collect()
    }

    /// Lets every client end its stream.
    pub async fn finish(mut self) -> Vec<Sample> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        std::mem::take(&mut self.samples.lock())
    }
}
