# What story S2 needs in Google Cloud beside the dataset, which is there: a registry, a Cloud Run
# job, two buckets, and two identities. The workers read metadata of tables and never a row; the
# containers read the dataset, write the exports, and start nothing but extract jobs.

terraform {
  required_version = ">= 1.5"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 6.0, < 8"
    }
  }
}

provider "google" {
  project = var.project
  region  = var.region
}

resource "google_project_service" "needed" {
  for_each = toset([
    "artifactregistry.googleapis.com",
    "bigquery.googleapis.com",
    "iam.googleapis.com",
    "logging.googleapis.com",
    "run.googleapis.com",
    "storage.googleapis.com",
  ])
  service            = each.value
  disable_on_destroy = false
}

# --- the image's registry ---

resource "google_artifact_registry_repository" "exports" {
  repository_id = "exports"
  location      = var.region
  format        = "DOCKER"
  depends_on    = [google_project_service.needed]
}

# --- identities ---

resource "google_service_account" "worker" {
  account_id   = "export-worker"
  display_name = "The dispatcher's workers: list tables; start, follow and cancel executions"
  depends_on   = [google_project_service.needed]
}

resource "google_service_account" "task" {
  account_id   = "export-task"
  display_name = "What runs in the container: extracts tables, publishes exports"
  depends_on   = [google_project_service.needed]
}

# --- the export ---

resource "google_cloud_run_v2_job" "export" {
  name                = "bigquery-export"
  location            = var.region
  deletion_protection = false
  depends_on          = [google_project_service.needed]

  template {
    # 0: as many at once as the region has room for. BigQuery does the work; a task only waits for it.
    parallelism = 0
    task_count  = 1

    template {
      service_account = google_service_account.task.email
      # Retries are the dispatcher's, so that they are counted, seen, and limited to what failed.
      max_retries = 0
      # Every run of ours brings its own; this is for a run from the console.
      timeout = "3600s"

      containers {
        image = var.image
        resources {
          limits = {
            cpu    = "1"
            memory = "512Mi"
          }
        }
      }
    }
  }
}

# --- storage ---

# The exports. BigQuery may rewrite a file while it writes it: no soft delete and no retention.
resource "google_storage_bucket" "exports" {
  name                        = "${var.project}-exports"
  location                    = var.location
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  soft_delete_policy {
    retention_duration_seconds = 0
  }
}

# Input documents, receipts and claims: DISPATCHER_STORAGE_URL.
resource "google_storage_bucket" "dispatcher" {
  name                        = "${var.project}-export-dispatcher"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  soft_delete_policy {
    retention_duration_seconds = 0
  }

  lifecycle_rule {
    condition {
      age = var.keep_days
    }
    action {
      type = "Delete"
    }
  }
}

# --- what the workers may do ---

# tables.list and tables.get, and no row.
resource "google_bigquery_dataset_iam_member" "worker_lists_tables" {
  dataset_id = var.dataset
  role       = "roles/bigquery.metadataViewer"
  member     = google_service_account.worker.member
}

# To start and to stop, on this job only. runWithOverrides is the power to run any argument as the
# task's identity: nobody but the workers has it.
resource "google_project_iam_custom_role" "launcher" {
  role_id     = "exportLauncher"
  title       = "Dispatcher: launch"
  description = "Start and cancel executions of a Cloud Run job."
  permissions = [
    "run.executions.cancel",
    "run.jobs.get",
    "run.jobs.run",
    "run.jobs.runWithOverrides",
  ]
}

resource "google_cloud_run_v2_job_iam_member" "worker_launches" {
  name     = google_cloud_run_v2_job.export.name
  location = var.region
  role     = google_project_iam_custom_role.launcher.id
  member   = google_service_account.worker.member
}

# To follow, on the project: executions nobody owns are looked for with one list over all jobs of the
# region, and log entries are the project's. It only reads.
resource "google_project_iam_custom_role" "follower" {
  role_id     = "exportFollower"
  title       = "Dispatcher: follow"
  description = "Read executions and tasks of Cloud Run jobs, and the last lines that they wrote."
  permissions = [
    "logging.logEntries.list",
    "run.executions.get",
    "run.executions.list",
    "run.jobs.list",
    "run.tasks.list",
  ]
}

resource "google_project_iam_member" "worker_follows" {
  project = var.project
  role    = google_project_iam_custom_role.follower.id
  member  = google_service_account.worker.member
}

resource "google_storage_bucket_iam_member" "worker_stores" {
  bucket = google_storage_bucket.dispatcher.name
  role   = "roles/storage.objectUser"
  member = google_service_account.worker.member
}

# --- what the containers may do ---

# To start jobs, and to look at those that they started themselves.
resource "google_project_iam_member" "task_starts_extracts" {
  project = var.project
  role    = "roles/bigquery.jobUser"
  member  = google_service_account.task.member
}

resource "google_bigquery_dataset_iam_member" "task_reads_tables" {
  dataset_id = var.dataset
  role       = "roles/bigquery.dataViewer"
  member     = google_service_account.task.member
}

# Extract jobs write with the identity that started them; stale files are listed and deleted.
resource "google_storage_bucket_iam_member" "task_exports" {
  bucket = google_storage_bucket.exports.name
  role   = "roles/storage.objectUser"
  member = google_service_account.task.member
}

resource "google_storage_bucket_iam_member" "task_reads_input" {
  bucket = google_storage_bucket.dispatcher.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.task.member

  condition {
    title      = "inputs only"
    expression = "resource.name.startsWith('projects/_/buckets/${google_storage_bucket.dispatcher.name}/objects/inputs/')"
  }
}

# Receipts, also those in progress, which are written again and again; and claims, which are read back.
resource "google_storage_bucket_iam_member" "task_writes" {
  for_each = toset(["claims", "results"])
  bucket   = google_storage_bucket.dispatcher.name
  role     = "roles/storage.objectUser"
  member   = google_service_account.task.member

  condition {
    title      = "${each.value} only"
    expression = "resource.name.startsWith('projects/_/buckets/${google_storage_bucket.dispatcher.name}/objects/${each.value}/')"
  }
}
