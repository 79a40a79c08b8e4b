//! The committed `src/cuda/sm90a/*.cubin` are what NVRTC makes of `src/cuda/*.cu`, and no kernel spills registers.
//! `UPDATE=1 cargo test -p kernels --test cubins` rewrites them.
//!
//! NVRTC comes with the PyPI package that `tests/clients/requirements.txt` pins, from `.venv`, or from where NVRTC points.
//! No GPU, driver or toolkit is needed.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::{Library, Symbol};

/// The version that the committed files were made with: a 12.x, so that drivers of CUDA 12 and 13 load them.
const VERSION: (c_int, c_int) = (12, 9);
const LIBRARY: &str = "nvidia/cuda_nvrtc/lib/libnvrtc.so.12";

/// Where NVRTC is, or why it cannot be had.
fn library() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("NVRTC") {
        return Ok(PathBuf::from(path));
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/lib");
    let versions = std::fs::read_dir(&root).into_iter().flatten().flatten();
    let mut found = versions.map(|entry| entry.path().join("site-packages").join(LIBRARY));
    found.find(|path| path.exists()).ok_or_else(|| {
        format!("no {LIBRARY} in .venv: `tests/run` installs it; or set NVRTC to libnvrtc.so.12")
    })
}

/// NVRTC, by the few of its functions that are used (nvrtc.h). Each returns 0 or an error.
struct Nvrtc(Library);

impl Nvrtc {
    /// Looks a function up.
    fn function<F>(&self, name: &CStr) -> Symbol<'_, F> {
        // SAFETY: callers name a function of nvrtc.h together with its type.
        unsafe { self.0.get(name.to_bytes_with_nul()) }.unwrap()
    }

    fn version(&self) -> (c_int, c_int) {
        type F = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two integers.
        assert_eq!(unsafe { self.function::<F>(c"nvrtcVersion")(&mut major, &mut minor) }, 0);
        (major, minor)
    }

    /// Compiles `source` of file `name` for Hopper; gives the cubin and what the compiler and ptxas said.
    fn compile(&self, name: &str, source: &str, include: &Path) -> (Vec<u8>, String) {
        type Create = unsafe extern "C" fn(
            *mut *mut c_void,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        type Compile = unsafe extern "C" fn(*mut c_void, c_int, *const *const c_char) -> c_int;
        let (source, name) = (CString::new(source).unwrap(), CString::new(name).unwrap());
        let options = [
            "-arch=sm_90a".to_owned(),
            "-std=c++17".to_owned(),
            "--ptxas-options=-v".to_owned(),
            format!("-I{}", include.display()),
        ];
        let options = options.map(|option| CString::new(option).unwrap());
        let pointers = options.each_ref().map(|option| option.as_ptr());
        let none = std::ptr::null();
        let mut program = std::ptr::null_mut();
        // SAFETY: strings end with zero and outlive the calls; there are as many options as is said.
        unsafe {
            let create = self.function::<Create>(c"nvrtcCreateProgram");
            assert_eq!(create(&mut program, source.as_ptr(), name.as_ptr(), 0, none, none), 0);
            let compile = self.function::<Compile>(c"nvrtcCompileProgram");
            let code = compile(program, pointers.len() as c_int, pointers.as_ptr());
            let log = self.bytes(program, c"nvrtcGetProgramLogSize", c"nvrtcGetProgramLog");
            let log = String::from_utf8_lossy(&log).into_owned();
            assert_eq!(code, 0, "{log}");
            (self.bytes(program, c"nvrtcGetCUBINSize", c"nvrtcGetCUBIN"), log)
        }
    }

    /// What a pair of functions, for the size and for the content, says of a program.
    ///
    /// # Safety
    /// `program` is one, and the functions are such a pair.
    unsafe fn bytes(&self, program: *mut c_void, size: &CStr, get: &CStr) -> Vec<u8> {
        type Size = unsafe extern "C" fn(*mut c_void, *mut usize) -> c_int;
        type Get = unsafe extern "C" fn(*mut c_void, *mut u8) -> c_int;
        let mut len = 0;
        // SAFETY: the buffer is as long as was asked for.
        unsafe {
            assert_eq!(self.function::<Size>(size)(program, &mut len), 0);
            let mut bytes = vec![0; len];
            assert_eq!(self.function::<Get>(get)(program, bytes.as_mut_ptr()), 0);
            bytes
        }
    }
}

/// The device code's source files.
fn sources() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> =
        files.filter(|path| path.extension().is_some_and(|end| end == "cu")).collect();
    found.sort();
    assert!(!found.is_empty());
    found
}

#[test]
fn committed_cubins_are_current_and_spill_nothing() {
    let nvrtc = match library() {
        // SAFETY: NVRTC's initialisers are sound.
        Ok(path) => Nvrtc(unsafe { Library::new(path) }.unwrap()),
        Err(why) => return println!("skipped: {why}"),
    };
    if nvrtc.version() != VERSION {
        let (found, wanted) = (nvrtc.version(), VERSION);
        return println!("skipped: NVRTC {found:?} is there, {wanted:?} made the committed files");
    }
    for source in sources() {
        let name = source.file_name().unwrap().to_str().unwrap();
        let text = std::fs::read_to_string(&source).unwrap();
        let (fresh, log) = nvrtc.compile(name, &text, source.parent().unwrap());
        let kernels = text.lines().filter(|line| line.contains("__global__")).count();
        assert!(log.matches("Compiling entry function").count() >= kernels, "{name}: {log}");
        for line in log.lines().filter(|line| line.contains("bytes spill stores")) {
            let none = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
            assert!(line.trim_end().ends_with(none), "{name} spills: {log}");
        }
        // What ptxas says when it has to wait after each wgmma.
        assert!(!log.contains("serialized"), "{name}: {log}");

        let committed = source.with_file_name("sm90a").join(name).with_extension("cubin");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&committed, &fresh).unwrap();
        }
        assert!(
            std::fs::read(&committed).unwrap_or_default() == fresh,
            "{} is stale: run `UPDATE=1 cargo test -p kernels --test cubins`",
            committed.display()
        );
    }
}
