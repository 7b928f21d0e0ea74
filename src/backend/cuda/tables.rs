//! Small arrays that kernels read: addresses of weights, lists of jobs. They recur step after step.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::Cuda;
use super::tensor::Array;

/// Arrays on the GPU by their content, so that what is found is always right.
#[derive(Default)]
pub(super) struct Tables(Mutex<HashMap<Vec<u64>, Arc<Array<u64>>>>);

/// More than a model's layers have in all; beyond, something does not recur.
const MOST: usize = 4096;

impl Cuda {
    /// These numbers on the GPU, copied there if they are not already.
    pub(in crate::backend::cuda) fn table(&self, values: Vec<u64>) -> Arc<Array<u64>> {
        let mut tables = self.tables.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = tables.get(&values) {
            return table.clone();
        }
        if tables.len() >= MOST {
            tables.clear();
        }
        let table = Arc::new(self.uploaded(&values));
        tables.insert(values, table.clone());
        table
    }
}
