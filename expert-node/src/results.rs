//! How a frame's results are written into its reply: as they were computed, one per
//! slot, or as the frame asks: in another dtype, or summed by row; and a reply that refuses it.

use bytes::{Bytes, BytesMut};
use model::rows::{NodeSum, convert};
use model::{Kernels, Numerics};
use proto::frame::all_finite;
use proto::v1::{DispatchError, DispatchFrame, DispatchReply, Dtype, ErrorCode};
use proto::wire;

/// The dtype activations have on the wire in a numerics class.
pub fn wire_dtype(numerics: Numerics) -> Dtype {
    match numerics {
        Numerics::F32 => Dtype::F32,
        Numerics::Bf16 => Dtype::Bf16,
    }
}

/// The reply that refuses a frame, as it goes to the stream.
pub fn refusal(frame: &DispatchFrame, code: ErrorCode, message: String) -> Bytes {
    let head = DispatchReply {
        ticket: frame.ticket,
        attempt: frame.attempt,
        error: Some(DispatchError { code: code as i32, message }),
        ..Default::default()
    };
    let mut wire = BytesMut::new();
    wire::put(&mut wire, &head, 0, |_| {});
    if frame.checksum.is_some() {
        wire::seal(&mut wire);
    }
    wire.freeze()
}

/// What a reply's rows are.
#[derive(Clone, Copy)]
pub struct Form {
    /// What was computed with.
    have: Numerics,
    want: Numerics,
    /// One row per row of the frame in place of one per slot.
    summed: bool,
}

impl Form {
    pub fn dtype(self) -> Dtype {
        wire_dtype(self.want)
    }

    /// How many rows the reply has.
    pub fn rows(self, frame: &DispatchFrame) -> usize {
        if self.summed { frame.slot_counts.len() } else { frame.experts.len() }
    }
}

/// Working memory, used again from reply to reply.
#[derive(Default)]
pub struct Writer {
    sum: NodeSum,
    row: Vec<u8>,
    converted: Vec<u8>,
}

impl Writer {
    /// What `frame`, which was checked, asks for.
    pub fn form(&self, frame: &DispatchFrame, have: Numerics) -> Form {
        let want = match Dtype::try_from(frame.reply_dtype) {
            Ok(Dtype::F32) => Numerics::F32,
            Ok(Dtype::Bf16) => Numerics::Bf16,
            _ => have,
        };
        Form { have, want, summed: !frame.weights.is_empty() }
    }

    /// Hands the reply's rows to `put`, from `results` in slot order; false if a value is not
    /// finite. Each is looked at while it is in the cache.
    pub fn write<'a>(
        &mut self,
        kernels: Kernels,
        form: Form,
        frame: &DispatchFrame,
        mut results: impl Iterator<Item = &'a [u8]>,
        mut put: impl FnMut(&[u8]),
    ) -> bool {
        let mut finite = true;
        if !form.summed {
            for row in results {
                finite &= self.put(form, row, &mut put);
            }
            return finite;
        }
        let mut weights = frame.weights.iter().copied();
        let mut row = std::mem::take(&mut self.row);
        row.resize(wire_dtype(form.have).row_bytes(frame.hidden as usize), 0);
        for &count in &frame.slot_counts {
            let weighted = results.by_ref().zip(weights.by_ref()).take(count as usize);
            self.sum.row(kernels, form.have, weighted, &mut row);
            finite &= self.put(form, &row, &mut put);
        }
        self.row = row;
        finite
    }

    fn put(&mut self, form: Form, row: &[u8], put: &mut impl FnMut(&[u8])) -> bool {
        let mut row = row;
        if form.have != form.want {
            self.converted.clear();
            convert(form.have, form.want, row, &mut self.converted);
            row = &self.converted;
        }
        put(row);
        all_finite(row, form.dtype())
    }
}
