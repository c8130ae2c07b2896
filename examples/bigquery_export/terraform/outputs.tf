output "registry" {
  description = "Where the image is pushed to."
  value       = "${var.region}-docker.pkg.dev/${var.project}/${google_artifact_registry_repository.exports.repository_id}"
}

output "storage" {
  description = "For DISPATCHER_STORAGE_URL."
  value       = "gs://${google_storage_bucket.dispatcher.name}"
}

output "exports" {
  description = "What begins DESTINATION in jobs.yaml."
  value       = "gs://${google_storage_bucket.exports.name}"
}

output "worker" {
  description = "Whom the workers run as."
  value       = google_service_account.worker.email
}
