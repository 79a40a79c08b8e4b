//! The trunk's kernels (`src/cuda/{attention,gate,rows,sample}.cu`), run on the CPU through a stand-in for the GPU
//! (`standin/`): against a plain reference in double, over memory that is poisoned and fenced, and row by row. It cannot
//! show how hardware rounds or how fast it is.

#[path = "trunk/attention.rs"]
mod attention;
#[path = "standin/common.rs"]
mod common;
#[path = "standin/compiled.rs"]
mod compiled;
#[path = "trunk/device.rs"]
mod device;
#[path = "standin/driver.rs"]
mod driver;
#[path = "trunk/gate.rs"]
mod gate;
#[path = "trunk/product.rs"]
mod product;
#[path = "trunk/rows.rs"]
mod rows;
#[path = "trunk/sample.rs"]
mod sample;
#[path = "trunk/waves.rs"]
mod waves;
