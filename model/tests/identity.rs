//! A token's logits are the same bits however its sequence was computed: in one chunk or in many,
//! alone or among others, on however many threads, with whatever instruction set and page size.

use std::collections::BTreeMap;
use std::sync::Arc;

use model::local::{Local, pages};
use model::synthetic::{Recipe, Storage, TempDir};
use model::{Checkpoint, Chunk, Compute, Isa, KvPool, LogitRows, Numerics};
use serde_json::json;

#[derive(Clone, Copy)]
struct How {
    isa: Isa,
    threads: usize,
    page_tokens: usize,
}

fn plain() -> How {
    How { isa: Isa::detect(), threads: 1, page_tokens: 16 }
}

struct Runner {
    model: Local,
    kv: KvPool,
    vocab: usize,
}

impl Runner {
    fn new(checkpoint: &Arc<Checkpoint>, numerics: Numerics, how: How) -> Runner {
        let compute = Arc::new(Compute::new(how.isa, how.threads));
        let pages = 1024 / how.page_tokens;
        Runner {
            model: Local::load(checkpoint, numerics, compute).unwrap(),
            kv: KvPool::new(checkpoint.config(), numerics, pages, how.page_tokens).unwrap(),
            vocab: checkpoint.config().vocab,
        }
    }

    /// Bits of the logits of every token, computed in chunks of the given sizes, the last one
    /// repeated.
    fn chunked(&mut self, tokens: &[u32], sizes: &[usize]) -> Vec<u32> {
        let pages = pages(&mut self.kv, tokens.len()).unwrap();
        let mut sizes = sizes.iter().copied().chain(std::iter::repeat(*sizes.last().unwrap()));
        let mut bits = Vec::new();
        let mut start = 0;
        while start < tokens.len() {
            let end = tokens.len().min(start + sizes.next().unwrap());
            let tokens = &tokens[start..end];
            let chunk = Chunk { tokens, start, pages: &pages, logits: LogitRows::All };
            let logits = self.model.run(&[chunk], &mut self.kv, |_, _| {}).unwrap();
            bits.extend(logits.iter().map(|l| l.to_bits()));
            start = end;
        }
        pages.into_iter().for_each(|p| self.kv.free(p));
        bits
    }

    /// The same for several sequences in the same steps, `size` tokens of each at a time.
    fn together(&mut self, sequences: &[Vec<u32>], sizes: &[usize]) -> Vec<Vec<u32>> {
        let tables: Vec<_> =
            sequences.iter().map(|s| pages(&mut self.kv, s.len()).unwrap()).collect();
        let mut bits = vec![Vec::new(); sequences.len()];
        let mut starts = vec![0; sequences.len()];
        loop {
            let mut chunks = Vec::new();
            let mut owners = Vec::new();
            for (i, sequence) in sequences.iter().enumerate() {
                let (start, end) = (starts[i], sequence.len().min(starts[i] + sizes[i]));
                if start < end {
                    let tokens = &sequence[start..end];
                    chunks.push(Chunk { tokens, start, pages: &tables[i], logits: LogitRows::All });
                    owners.push((i, end - start));
                    starts[i] = end;
                }
            }
            if chunks.is_empty() {
                break;
            }
            let logits = self.model.run(&chunks, &mut self.kv, |_, _| {}).unwrap();
            let mut rows = logits.chunks(self.vocab);
            for (i, count) in owners {
                let mine = rows.by_ref().take(count).flatten();
                bits[i].extend(mine.map(|l| l.to_bits()));
            }
        }
        tables.into_iter().flatten().for_each(|p| self.kv.free(p));
        bits
    }
}

fn tokens(seed: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 7 + i * 13 + seed * 31) % 97).collect()
}

fn models() -> [Recipe; 3] {
    let fp8 = json!({
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 16]},
    });
    let plain = json!({
        "q_lora_rank": null, "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 33,
        "n_shared_experts": 0, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
    });
    let mut quantised = Recipe::small().with(fp8);
    quantised.storage = Storage::Fp8;
    let mut single = Recipe::small().with(plain);
    single.storage = Storage::F32;
    [Recipe::small(), quantised, single]
}

/// Runs `check` for every model and class, with the bits of one sequence in one chunk.
fn each(check: impl Fn(&Arc<Checkpoint>, Numerics, &[u32], &[u32])) {
    for recipe in models() {
        let dir = TempDir::with(&recipe).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        for numerics in [Numerics::F32, Numerics::Bf16] {
            let tokens = tokens(1, 75);
            let expected = Runner::new(&checkpoint, numerics, plain()).chunked(&tokens, &[75]);
            assert!(expected.iter().all(|b| f32::from_bits(*b).is_finite()));
            check(&checkpoint, numerics, &tokens, &expected);
        }
    }
}

#[test]
fn one_chunk_is_many_chunks_is_token_by_token() {
    each(|checkpoint, numerics, tokens, expected| {
        let mut runner = Runner::new(checkpoint, numerics, plain());
        for sizes in [&[1][..], &[7], &[16], &[17], &[1, 40, 3, 20, 2], &[50, 1]] {
            assert!(runner.chunked(tokens, sizes) == expected, "{numerics} in chunks of {sizes:?}");
        }
    });
}

#[test]
fn batch_mates_do_not_show() {
    each(|checkpoint, numerics, first, expected| {
        let mut runner = Runner::new(checkpoint, numerics, plain());
        let mut sequences: Vec<_> = (2..9).map(|i| tokens(i, 9 * i as usize + 3)).collect();
        sequences.insert(3, first.to_vec());
        let sizes = [1, 30, 7, 20, 64, 2, 100, 5];
        let bits = runner.together(&sequences, &sizes);
        assert!(bits[3] == expected, "{numerics} among others");
        let again = runner.together(&sequences, &[3, 1, 9, 100, 2, 31, 4, 1]);
        assert!(bits == again, "{numerics} in other steps");
        for (sequence, bits) in sequences.iter().zip(bits) {
            assert!(runner.chunked(sequence, &[11]) == bits, "{numerics} alone");
        }
    });
}

#[test]
fn threads_instruction_sets_and_page_sizes_do_not_show() {
    each(|checkpoint, numerics, tokens, expected| {
        let all = [(1, 16), (2, 16), (5, 16), (2, 64), (1, 5)];
        let detected = numerics.class(Isa::detect());
        let mut classes = BTreeMap::from([(detected, expected.to_vec())]);
        for isa in Isa::available() {
            // A class that is another device's has bits of its own, the same on all of its sets.
            let expected = classes.entry(numerics.class(isa)).or_insert_with(|| {
                Runner::new(checkpoint, numerics, How { isa, ..plain() }).chunked(tokens, &[64])
            });
            // The scalar kernels are slow, and threads and pages are not their business.
            let ways = if isa == Isa::Scalar { &all[1..2] } else { &all[..] };
            for &(threads, page_tokens) in ways {
                let how = How { isa, threads, page_tokens };
                let mut runner = Runner::new(checkpoint, numerics, how);
                let what = format!("{numerics} {isa} {threads} threads, pages of {page_tokens}");
                assert!(runner.chunked(tokens, &[64, 1]) == *expected, "{what}");
                let others = vec![tokens[3..40].to_vec(), tokens.to_vec(), tokens[..60].to_vec()];
                assert!(runner.together(&others, &[4, 33, 9])[1] == *expected, "{what}, together");
            }
        }
    });
}

/// Long enough for several of attention's blocks of positions.
#[test]
fn blocks_of_positions_do_not_show() {
    let dir = TempDir::with(&Recipe::small()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    for numerics in [Numerics::F32, Numerics::Bf16] {
        let tokens = tokens(5, 301);
        let expected = Runner::new(&checkpoint, numerics, plain()).chunked(&tokens, &[301]);
        for (threads, page_tokens) in [(1, 16), (2, 64), (5, 7), (3, 128)] {
            let how = How { threads, page_tokens, ..plain() };
            let mut runner = Runner::new(&checkpoint, numerics, how);
            for sizes in [&[127, 1, 1, 40][..], &[256, 1], &[301]] {
                let what = format!("{numerics} {threads} threads, pages of {page_tokens}");
                assert!(runner.chunked(&tokens, sizes) == expected, "{what}, chunks {sizes:?}");
            }
            let others = [tokens[3..150].to_vec(), tokens.clone(), tokens[..260].to_vec()];
            assert!(runner.together(&others, &[4, 101, 9])[1] == expected);
        }
    }
}
