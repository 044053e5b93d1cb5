//! The functions of `libcublasLt` that cudarc calls for atkd: products are queued on their stream, like a driver's work.
//!
//! A product is refused whose shapes or dtypes do not go together, or whose addresses are less aligned than was promised
//! when its algorithm was asked for, and so is work without a context. Sums are in float32 and in one part.

use std::ffi::c_void;
use std::ops::Range;
use std::ptr;
use std::sync::PoisonError;

use atkd::cuda::cudarc::cublaslt::sys::cublasStatus_t::{self, *};
use atkd::cuda::cudarc::cublaslt::sys::{
    cublasComputeType_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t, cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreference_t,
    cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayout_t, cudaDataType, cudaStream_t,
};
use half::{bf16, f16};

use crate::device::Work;
use crate::{DRIVER, count};

type Answer<T = ()> = Result<T, cublasStatus_t>;

/// The library takes addresses for multiples of this, if nothing else is promised.
const ALIGNMENT: u32 = 256;

#[derive(Clone, Copy)]
struct Layout {
    dtype: cudaDataType,
    /// Rows and columns; elements of a column follow each other.
    shape: [usize; 2],
    /// Elements from column to column.
    column: usize,
}

#[derive(Clone, Copy)]
struct Preference {
    scratch: usize,
    /// The addresses of a, b, c and d are multiples of these.
    alignments: [u32; 4],
}

/// `to = factor * one * other + beta * to`, each but `to` perhaps transposed.
#[derive(Clone)]
pub struct Product {
    factor: f32,
    beta: f32,
    factors: [(Matrix, bool); 2],
    to: Matrix,
}

#[derive(Clone, Copy)]
struct Matrix {
    address: usize,
    layout: Layout,
}

fn size(dtype: cudaDataType) -> Answer<usize> {
    match dtype {
        cudaDataType::CUDA_R_32F => Ok(4),
        cudaDataType::CUDA_R_16F | cudaDataType::CUDA_R_16BF => Ok(2),
        _ => Err(CUBLAS_STATUS_NOT_SUPPORTED),
    }
}

impl Matrix {
    fn bytes(&self) -> Range<usize> {
        let Layout { dtype, shape: [rows, columns], column } = self.layout;
        let bytes = ((columns - 1) * column + rows) * size(dtype).expect("it was checked");
        self.address..self.address + bytes
    }

    fn at(&self, row: usize, column: usize) -> usize {
        row + column * self.layout.column
    }

    /// # Safety
    /// The matrix is there.
    unsafe fn get(&self, row: usize, column: usize) -> f32 {
        let at = self.at(row, column);
        // SAFETY: the caller's.
        unsafe {
            match self.layout.dtype {
                cudaDataType::CUDA_R_16F => (self.address as *const f16).add(at).read().into(),
                cudaDataType::CUDA_R_16BF => (self.address as *const bf16).add(at).read().into(),
                _ => (self.address as *const f32).add(at).read(),
            }
        }
    }

    /// # Safety
    /// The matrix is there.
    unsafe fn set(&self, row: usize, column: usize, value: f32) {
        let at = self.at(row, column);
        // SAFETY: the caller's.
        unsafe {
            match self.layout.dtype {
                cudaDataType::CUDA_R_16F => {
                    (self.address as *mut f16).add(at).write(f16::from_f32(value));
                }
                cudaDataType::CUDA_R_16BF => {
                    (self.address as *mut bf16).add(at).write(bf16::from_f32(value));
                }
                _ => (self.address as *mut f32).add(at).write(value),
            }
        }
    }
}

impl Product {
    /// The bytes that it reads and writes.
    pub fn ranges(&self) -> [Range<usize>; 3] {
        let [one, other] = self.factors.each_ref().map(|(matrix, _)| matrix.bytes());
        [one, other, self.to.bytes()]
    }

    /// # Safety
    /// All bytes are there.
    pub unsafe fn run(&self) {
        let [(one, first), (other, second)] = self.factors;
        let [rows, columns] = self.to.layout.shape;
        let shared = one.layout.shape[usize::from(!first)];
        // SAFETY: the caller's, and that shapes fit was checked.
        let wide = |matrix: Matrix, transposed: bool, outer: usize, is_first: bool| -> Vec<f32> {
            let element = |i| match transposed == is_first {
                true => unsafe { matrix.get(i, outer) },
                false => unsafe { matrix.get(outer, i) },
            };
            (0..shared).map(element).collect()
        };
        let left: Vec<Vec<f32>> = (0..rows).map(|row| wide(one, first, row, true)).collect();
        for column in 0..columns {
            let right = wide(other, second, column, false);
            for (row, left) in left.iter().enumerate() {
                let sum: f32 = left.iter().zip(&right).map(|(x, y)| x * y).sum();
                // Without a factor for what was there, that is not read.
                // SAFETY: the caller's.
                unsafe {
                    let before =
                        if self.beta == 0.0 { 0.0 } else { self.beta * self.to.get(row, column) };
                    self.to.set(row, column, self.factor * sum + before);
                }
            }
        }
    }
}

/// # Safety
/// There is an object of that type.
unsafe fn object<'a, T>(object: *mut impl Sized) -> Answer<&'a mut T> {
    // SAFETY: the caller's.
    unsafe { object.cast::<T>().as_mut() }.ok_or(CUBLAS_STATUS_INVALID_VALUE)
}

/// # Safety
/// There is a value of `size` bytes at `from`.
unsafe fn take<T: Copy>(from: *const c_void, size: usize) -> Answer<T> {
    if size != size_of::<T>() {
        return Err(CUBLAS_STATUS_INVALID_VALUE);
    }
    // SAFETY: the caller's.
    Ok(unsafe { from.cast::<T>().read_unaligned() })
}

fn shape_of(layout: &Layout, transposed: bool) -> [usize; 2] {
    let [rows, columns] = layout.shape;
    if transposed { [columns, rows] } else { [rows, columns] }
}

/// That the matrices go together.
fn check(transposed: [bool; 2], a: &Layout, b: &Layout, c: &Layout, d: &Layout) -> Answer {
    let ([rows, shared], [as_many, columns]) =
        (shape_of(a, transposed[0]), shape_of(b, transposed[1]));
    let fits = shared == as_many && d.shape == [rows, columns] && c.shape == d.shape;
    let is_empty = rows * shared * columns == 0;
    if !fits || is_empty || [a, b, c, d].iter().any(|layout| layout.column < layout.shape[0]) {
        return Err(CUBLAS_STATUS_INVALID_VALUE);
    }
    let widens = d.dtype == cudaDataType::CUDA_R_32F;
    let supported = a.dtype == b.dtype && c.dtype == d.dtype && (widens || d.dtype == a.dtype);
    supported.then_some(()).ok_or(CUBLAS_STATUS_NOT_SUPPORTED)
}

fn in_a_context() -> Answer {
    let driver = &mut *DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
    driver.context().map(drop).map_err(|_| CUBLAS_STATUS_NOT_INITIALIZED)
}

macro_rules! cublas {
    ($(fn $name:ident($($argument:ident: $type:ty),*) $body:block)+) => {
        $(
            /// # Safety
            /// The arguments are what the library's documentation asks for.
            #[unsafe(no_mangle)]
            #[allow(clippy::too_many_arguments, reason = "as many as the library's has")]
            unsafe extern "C" fn $name($($argument: $type),*) -> cublasStatus_t {
                let answer = || -> Answer {
                    // SAFETY: the caller's objects and values are what the library's documentation asks for.
                    unsafe { $body }
                };
                count(stringify!($name));
                answer().err().unwrap_or(CUBLAS_STATUS_SUCCESS)
            }
        )+
    };
}

cublas! {
    fn cublasLtCreate(to: *mut cublasLtHandle_t) {
        in_a_context()?;
        to.write(Box::into_raw(Box::new(0_u8)).cast());
        Ok(())
    }

    fn cublasLtDestroy(handle: cublasLtHandle_t) {
        in_a_context()?;
        drop(Box::from_raw(handle.cast::<u8>()));
        Ok(())
    }

    fn cublasLtMatrixLayoutCreate(
        to: *mut cublasLtMatrixLayout_t, dtype: cudaDataType, rows: u64, columns: u64, column: i64
    ) {
        size(dtype)?;
        let (shape, column) = ([rows as usize, columns as usize], column as usize);
        to.write(Box::into_raw(Box::new(Layout { dtype, shape, column })).cast());
        Ok(())
    }

    fn cublasLtMatrixLayoutDestroy(layout: cublasLtMatrixLayout_t) {
        drop(Box::from_raw(layout.cast::<Layout>()));
        Ok(())
    }

    fn cublasLtMatmulDescCreate(
        to: *mut cublasLtMatmulDesc_t, compute: cublasComputeType_t, scale: cudaDataType
    ) {
        let exact = compute == cublasComputeType_t::CUBLAS_COMPUTE_32F;
        if !exact || scale != cudaDataType::CUDA_R_32F {
            return Err(CUBLAS_STATUS_NOT_SUPPORTED);
        }
        to.write(Box::into_raw(Box::new([false; 2])).cast());
        Ok(())
    }

    fn cublasLtMatmulDescSetAttribute(
        product: cublasLtMatmulDesc_t,
        attribute: cublasLtMatmulDescAttributes_t,
        value: *const c_void,
        bytes: usize
    ) {
        use cublasLtMatmulDescAttributes_t as Attribute;
        let transposed: &mut [bool; 2] = object(product)?;
        let which = match attribute {
            Attribute::CUBLASLT_MATMUL_DESC_TRANSA => 0,
            Attribute::CUBLASLT_MATMUL_DESC_TRANSB => 1,
            _ => return Err(CUBLAS_STATUS_NOT_SUPPORTED),
        };
        transposed[which] = match take::<i32>(value, bytes)? {
            0 => false,
            1 => true,
            _ => return Err(CUBLAS_STATUS_INVALID_VALUE),
        };
        Ok(())
    }

    fn cublasLtMatmulDescDestroy(product: cublasLtMatmulDesc_t) {
        drop(Box::from_raw(product.cast::<[bool; 2]>()));
        Ok(())
    }

    fn cublasLtMatmulPreferenceCreate(to: *mut cublasLtMatmulPreference_t) {
        let preference = Preference { scratch: 0, alignments: [ALIGNMENT; 4] };
        to.write(Box::into_raw(Box::new(preference)).cast());
        Ok(())
    }

    fn cublasLtMatmulPreferenceSetAttribute(
        preference: cublasLtMatmulPreference_t,
        attribute: cublasLtMatmulPreferenceAttributes_t,
        value: *const c_void,
        bytes: usize
    ) {
        use cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference: &mut Preference = object(preference)?;
        let which = match attribute {
            Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES => {
                preference.scratch = take(value, bytes)?;
                return Ok(());
            }
            Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK => {
                return take::<u32>(value, bytes).map(drop);
            }
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES => 0,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES => 1,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES => 2,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES => 3,
            _ => return Err(CUBLAS_STATUS_NOT_SUPPORTED),
        };
        preference.alignments[which] = take(value, bytes)?;
        Ok(())
    }

    fn cublasLtMatmulPreferenceDestroy(preference: cublasLtMatmulPreference_t) {
        drop(Box::from_raw(preference.cast::<Preference>()));
        Ok(())
    }

    fn cublasLtMatmulAlgoGetHeuristic(
        _handle: cublasLtHandle_t,
        product: cublasLtMatmulDesc_t,
        a: cublasLtMatrixLayout_t,
        b: cublasLtMatrixLayout_t,
        c: cublasLtMatrixLayout_t,
        d: cublasLtMatrixLayout_t,
        preference: cublasLtMatmulPreference_t,
        most: i32,
        to: *mut cublasLtMatmulHeuristicResult_t,
        count: *mut i32
    ) {
        check(*object(product)?, object(a)?, object(b)?, object(c)?, object(d)?)?;
        let Preference { scratch, alignments } = *object(preference)?;
        if most < 1 {
            return Err(CUBLAS_STATUS_INVALID_VALUE);
        }
        let mut found: cublasLtMatmulHeuristicResult_t = std::mem::zeroed();
        // The product is held to what was promised here.
        found.algo.data[..4].copy_from_slice(&alignments.map(u64::from));
        found.algo.data[4] = scratch as u64;
        (found.workspaceSize, found.state) = (scratch, CUBLAS_STATUS_SUCCESS);
        to.write(found);
        count.write(1);
        Ok(())
    }

    fn cublasLtMatmul(
        _handle: cublasLtHandle_t,
        product: cublasLtMatmulDesc_t,
        factor: *const c_void,
        a: *const c_void,
        a_layout: cublasLtMatrixLayout_t,
        b: *const c_void,
        b_layout: cublasLtMatrixLayout_t,
        beta: *const c_void,
        c: *const c_void,
        c_layout: cublasLtMatrixLayout_t,
        d: *mut c_void,
        d_layout: cublasLtMatrixLayout_t,
        algorithm: *const cublasLtMatmulAlgo_t,
        scratch: *mut c_void,
        scratch_bytes: usize,
        stream: cudaStream_t
    ) {
        let transposed: [bool; 2] = *object(product)?;
        let [a_layout, b_layout, c_layout, d_layout]: [&mut Layout; 4] =
            [object(a_layout)?, object(b_layout)?, object(c_layout)?, object(d_layout)?];
        check(transposed, a_layout, b_layout, c_layout, d_layout)?;
        let promised = algorithm.as_ref().ok_or(CUBLAS_STATUS_INVALID_VALUE)?.data;
        let addresses = [a, b, c, d.cast_const()].map(|address| address as u64);
        let aligned = addresses.iter().zip(promised).all(|(address, of)| address.is_multiple_of(of));
        let has_room = scratch_bytes as u64 >= promised[4]
            && (scratch as usize).is_multiple_of(ALIGNMENT as usize);
        if !aligned || !has_room || !ptr::eq(c, d) || c_layout.column != d_layout.column {
            return Err(CUBLAS_STATUS_INVALID_VALUE);
        }
        let matrix =
            |address: *const c_void, layout: &Layout| Matrix { address: address as usize, layout: *layout };
        let product = Product {
            factor: factor.cast::<f32>().read(),
            beta: beta.cast::<f32>().read(),
            factors: [(matrix(a, a_layout), transposed[0]), (matrix(b, b_layout), transposed[1])],
            to: matrix(d, d_layout),
        };
        let driver = &mut *DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
        for range in product.ranges() {
            let inside = driver.range(range.start as u64, range.len());
            inside.map_err(|_| CUBLAS_STATUS_INVALID_VALUE)?;
        }
        let stream = driver.stream(stream.cast()).map_err(|_| CUBLAS_STATUS_INVALID_VALUE)?;
        let enqueued = driver.enqueue(stream, Work::Product(product));
        enqueued.map_err(|_| CUBLAS_STATUS_EXECUTION_FAILED)
    }
}
