//! What a GPU does at most, measured: how fast memory is copied, and how fast cuBLASLt multiplies.

use std::ffi::c_void;
use std::time::Instant;

use cudarc::cublaslt::{result as lt, sys as lts};
use cudarc::driver::result;

use super::error::GpuError;
use super::gpu::{Gpu, Lane};
use super::layout::Coding;

/// Bytes of a copy, more than the caches hold.
const COPY: usize = 1 << 30;
/// Edge of the square product.
const EDGE: usize = 8192;
const WORKSPACE: usize = 32 << 20;
const REPEATS: u32 = 10;

/// Seconds of one of `REPEATS` calls of `f` on the compute lane, after one to warm up.
fn seconds(gpu: &Gpu, mut f: impl FnMut() -> Result<(), GpuError>) -> Result<f64, GpuError> {
    f()?;
    gpu.wait(Lane::Compute)?;
    let start = Instant::now();
    for _ in 0..REPEATS {
        f()?;
    }
    gpu.wait(Lane::Compute)?;
    Ok(start.elapsed().as_secs_f64() / f64::from(REPEATS))
}

impl Gpu {
    /// Bytes a second that a copy within the device's memory reads and writes, both counted.
    pub fn copy_rate(&self) -> Result<f64, GpuError> {
        let (from, to) = (self.allocate("a copy", COPY)?, self.allocate("a copy", COPY)?);
        let stream = self.stream(Lane::Compute).cu_stream();
        let took = seconds(self, || {
            // SAFETY: both are that long and used by nothing else.
            let copied =
                unsafe { result::memcpy_dtod_async(to.address(), from.address(), COPY, stream) };
            copied.map_err(|error| self.error("copying memory", error))
        })?;
        Ok(2.0 * COPY as f64 / took)
    }

    /// Bytes a second from pinned host memory.
    pub fn host_rate(&self) -> Result<f64, GpuError> {
        const LEN: usize = 256 << 20;
        let (from, to) = (self.pin("a copy", LEN)?, self.allocate("a copy", LEN)?);
        let took = seconds(self, || {
            // SAFETY: waited for before anything is done with either.
            unsafe { to.copy_in(Lane::Compute, 0, &from) }
        })?;
        Ok(LEN as f64 / took)
    }

    /// Operations a second of cuBLASLt's product of two square matrices, bf16 out; `None` without the library, or if it
    /// has no such product.
    pub fn matmul_rate(&self, coding: Coding) -> Result<Option<f64>, GpuError> {
        // SAFETY: loads the library, whose initialisers are sound, and looks nothing up in it.
        if !unsafe { lts::is_culib_present() } {
            return Ok(None);
        }
        let element = match coding {
            Coding::Fp8 => lts::cudaDataType_t::CUDA_R_8F_E4M3,
            Coding::Bf16 => lts::cudaDataType_t::CUDA_R_16BF,
        };
        let bytes = EDGE * EDGE * coding.size();
        let operand = || self.allocate("a matrix", bytes);
        let (a, b) = (operand()?, operand()?);
        // 0x3838 is 0.00004 in bf16, and 0x38 is 1 in e4m3.
        a.fill(Lane::Compute, 0x38)?;
        b.fill(Lane::Compute, 0x38)?;
        let d = self.allocate("a matrix", EDGE * EDGE * 2)?;
        let workspace = self.allocate("a workspace", WORKSPACE)?;
        self.bind().map_err(|error| self.error("multiplying", error))?;
        let Some(plan) = Plan::new(element) else { return Ok(None) };
        let stream = self.stream(Lane::Compute).cu_stream();
        let (one, zero) = (1f32, 0f32);
        let took = seconds(self, || {
            let [a, b, d, workspace] = [&a, &b, &d, &workspace].map(|m| m.address() as *mut c_void);
            // SAFETY: layouts are those of the buffers, and the algorithm was found for them and this workspace.
            let multiplied = unsafe {
                lt::matmul(
                    plan.handle,
                    plan.product,
                    (&raw const one).cast(),
                    (&raw const zero).cast(),
                    a,
                    plan.operand,
                    b,
                    plan.operand,
                    d,
                    plan.output,
                    d,
                    plan.output,
                    &plan.found.algo,
                    workspace,
                    WORKSPACE,
                    stream.cast(),
                )
            };
            multiplied.map_err(|error| GpuError::Failed {
                ordinal: self.ordinal(),
                doing: "multiplying",
                code: format!("{error:?}"),
            })
        })?;
        Ok(Some(2.0 * (EDGE as f64).powi(3) / took))
    }
}

/// cuBLASLt's handles of one product.
struct Plan {
    handle: lts::cublasLtHandle_t,
    product: lts::cublasLtMatmulDesc_t,
    operand: lts::cublasLtMatrixLayout_t,
    output: lts::cublasLtMatrixLayout_t,
    found: lts::cublasLtMatmulHeuristicResult_t,
}

impl Plan {
    /// `d = a^T b`, both with k innermost, as FP8 products have to be. What is made is kept until the process ends.
    fn new(element: lts::cudaDataType_t) -> Option<Plan> {
        use lts::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA as TRANSPOSED;
        use lts::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as BYTES;
        let edge = EDGE as u64;
        let handle = lt::create_handle().ok()?;
        let f32 = lts::cudaDataType_t::CUDA_R_32F;
        let product =
            lt::create_matmul_desc(lts::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32).ok()?;
        let operand = lt::create_matrix_layout(element, edge, edge, EDGE as i64).ok()?;
        let bf16 = lts::cudaDataType_t::CUDA_R_16BF;
        let output = lt::create_matrix_layout(bf16, edge, edge, EDGE as i64).ok()?;
        let preference = lt::create_matmul_pref().ok()?;
        // cublasOperation_t's "transposed".
        let transposed = 1i32;
        let workspace = WORKSPACE as u64;
        // SAFETY: the attributes have those types, and all handles were just made.
        let found = unsafe {
            let value = (&raw const transposed).cast();
            lt::set_matmul_desc_attribute(product, TRANSPOSED, value, size_of::<i32>()).ok()?;
            let value = (&raw const workspace).cast();
            lt::set_matmul_pref_attribute(preference, BYTES, value, size_of::<u64>()).ok()?;
            lt::get_matmul_algo_heuristic(
                handle, product, operand, operand, output, output, preference,
            )
            .ok()?
        };
        Some(Plan { handle, product, operand, output, found })
    }
}
