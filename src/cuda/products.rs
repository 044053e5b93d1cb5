//! Products of matrices, by cuBLASLt.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    cublasComputeType_t, cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t,
    cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayout_t,
    cudaDataType,
};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::driver;
use crate::{Dtype, Error, Result};

/// Bytes that a product may take beside its matrices: what NVIDIA recommends for Hopper.
const SCRATCH_BYTES: usize = 32 << 20;

/// A handle of cuBLASLt, and memory that its products take beside their matrices. They follow each other on one stream.
#[derive(Debug)]
pub(super) struct Products {
    handle: Owned<cublasLtHandle_t>,
    scratch: CudaSlice<u8>,
}

// SAFETY: a handle belongs to no thread. Two threads that used one at once would share the scratch memory, so that it is
// not Sync.
unsafe impl Send for Products {}

impl Drop for Products {
    fn drop(&mut self) {
        // The handle is of this context. Nothing is left to do about an error.
        let _ = self.scratch.context().bind_to_thread();
    }
}

/// A matrix on the device: its element (i, j) lies `i * row + j` elements behind `address`, or `j * row + i` if it is
/// transposed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    pub address: u64,
    pub dtype: Dtype,
    /// Rows and columns as they lie there.
    pub shape: [usize; 2],
    pub row: usize,
    pub transposed: bool,
}

impl Matrix {
    /// A matrix whose rows follow each other.
    pub fn new(address: u64, dtype: Dtype, shape: [usize; 2]) -> Self {
        Self { address, dtype, shape, row: shape[1], transposed: false }
    }

    pub fn transposed(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// The rows from `first` on.
    pub fn rows(self, first: usize, count: usize) -> Self {
        let address = self.address + (first * self.row * self.dtype.size()) as u64;
        Self { address, shape: [count, self.shape[1]], ..self }
    }

    pub fn bytes_of_row(self) -> usize {
        self.shape[1] * self.dtype.size()
    }
}

impl Products {
    /// # Errors
    /// If the library is missing or refuses, or there is no memory.
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        // With candle-cuda the library is linked, and so is there.
        #[cfg(not(feature = "candle-cuda"))]
        // SAFETY: looks whether it can be loaded.
        if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
            return Err(Error::NoCublas);
        }
        stream.context().bind_to_thread().map_err(driver("using the context"))?;
        // SAFETY: cuBLASLt writes what it reads of it.
        let scratch = unsafe { stream.alloc(SCRATCH_BYTES) };
        let scratch = scratch.map_err(driver("allocating memory for products"))?;
        let handle = Owned::new(result::create_handle(), |handle| {
            // SAFETY: it is destroyed once.
            unsafe { result::destroy_handle(handle) }
        })?;
        Ok(Self { handle, scratch })
    }

    pub fn stream(&self) -> &Arc<CudaStream> {
        self.scratch.stream()
    }

    /// Enqueues `to = factor * one * other`, or `to += factor * one * other`. The sums are in float32.
    ///
    /// # Errors
    /// If the library refuses.
    ///
    /// # Safety
    /// The shapes fit, `one` and `other` are of one dtype, `to` is of that dtype or float32, and none is empty; the
    /// addresses are of such memory, which nobody frees or, for the first two, writes until the stream is done with it.
    pub unsafe fn multiply(
        &mut self,
        factor: f32,
        [one, other]: [Matrix; 2],
        adds: bool,
        to: Matrix,
    ) -> Result<()> {
        let product = description()?;
        // The library's matrices lie by columns: what it takes for `to` is `to` transposed, and that is
        // `other` transposed times `one` transposed.
        let [first, second] = [other, one];
        for (attribute, matrix) in [
            (cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, first),
            (cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, second),
        ] {
            // CUBLAS_OP_N and CUBLAS_OP_T.
            let operation = i32::from(matrix.transposed);
            let (value, size) = as_bytes(&operation);
            // SAFETY: the description is there, and the value is of the attribute's type.
            unsafe { result::set_matmul_desc_attribute(product.value, attribute, value, size) }
                .map_err(cublas)?;
        }
        let [first_layout, second_layout, to_layout] =
            [layout(first)?, layout(second)?, layout(to)?];
        let preference = self.preference(first, second, to)?;
        let stream = self.scratch.stream();
        let (scratch, _guard) = self.scratch.device_ptr(stream);
        let (beta, at) = (f32::from(u8::from(adds)), |address: u64| address as *mut c_void);
        // SAFETY: the descriptions are there; the caller vouches for the matrices.
        unsafe {
            let found = result::get_matmul_algo_heuristic(
                self.handle.value,
                product.value,
                first_layout.value,
                second_layout.value,
                to_layout.value,
                to_layout.value,
                preference.value,
            )
            .map_err(cublas)?;
            result::matmul(
                self.handle.value,
                product.value,
                as_bytes(&factor).0,
                as_bytes(&beta).0,
                at(first.address),
                first_layout.value,
                at(second.address),
                second_layout.value,
                at(to.address),
                to_layout.value,
                at(to.address),
                to_layout.value,
                &found.algo,
                at(scratch),
                SCRATCH_BYTES,
                stream.cu_stream().cast(),
            )
            .map_err(cublas)
        }
    }

    /// The memory that an algorithm may take, and the alignments that it may count on.
    fn preference(
        &self,
        first: Matrix,
        second: Matrix,
        to: Matrix,
    ) -> Result<Owned<cublasLtMatmulPreference_t>> {
        use cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Owned::new(result::create_matmul_pref(), |preference| {
            // SAFETY: it is destroyed once.
            unsafe { result::destroy_matmul_pref(preference) }
        })?;
        let set = |attribute, (value, size): (*const c_void, usize)| {
            // SAFETY: the preference is there, and the value is of the attribute's type.
            unsafe { result::set_matmul_pref_attribute(preference.value, attribute, value, size) }
                .map_err(cublas)
        };
        set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, as_bytes(&SCRATCH_BYTES))?;
        // Parts of a sum are added up in float32, and in nothing narrower: CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE.
        set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, as_bytes(&2_u32))?;
        // The library takes addresses for multiples of 256, if it is not told.
        for (attribute, matrix) in [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, first),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, second),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, to),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, to),
        ] {
            let alignment = 1_u32 << matrix.address.trailing_zeros().min(8);
            set(attribute, as_bytes(&alignment))?;
        }
        Ok(preference)
    }
}

fn description() -> Result<Owned<cublasLtMatmulDesc_t>> {
    let (compute, scale) = (cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType::CUDA_R_32F);
    Owned::new(result::create_matmul_desc(compute, scale), |product| {
        // SAFETY: it is destroyed once.
        unsafe { result::destroy_matmul_desc(product) }
    })
}

fn layout(matrix: Matrix) -> Result<Owned<cublasLtMatrixLayout_t>> {
    let dtype = match matrix.dtype {
        Dtype::F32 => cudaDataType::CUDA_R_32F,
        Dtype::F16 => cudaDataType::CUDA_R_16F,
        Dtype::Bf16 => cudaDataType::CUDA_R_16BF,
    };
    let [rows, columns] = matrix.shape.map(|size| size as u64);
    let layout = result::create_matrix_layout(dtype, columns, rows, matrix.row as i64);
    Owned::new(layout, |layout| {
        // SAFETY: it is destroyed once.
        unsafe { result::destroy_matrix_layout(layout) }
    })
}

fn as_bytes<T>(value: &T) -> (*const c_void, usize) {
    (std::ptr::from_ref(value).cast(), size_of::<T>())
}

/// An object of the library, which is destroyed in the end.
#[derive(Debug)]
struct Owned<T: Copy> {
    value: T,
    destroy: fn(T) -> std::result::Result<(), CublasError>,
}

impl<T: Copy> Owned<T> {
    fn new(
        created: std::result::Result<T, CublasError>,
        destroy: fn(T) -> std::result::Result<(), CublasError>,
    ) -> Result<Self> {
        Ok(Self { value: created.map_err(cublas)?, destroy })
    }
}

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // Nothing is left to do about an error.
        let _ = (self.destroy)(self.value);
    }
}

fn cublas(error: CublasError) -> Error {
    Error::Cublas { status: error.0 as u32, name: format!("{:?}", error.0) }
}
