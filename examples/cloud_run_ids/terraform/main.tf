# What story S1 needs in Google Cloud: a registry, three Cloud Run jobs, two buckets, and two
# identities. The images are not built here, and after the first one not chosen here either:
# `dispatcher apply` puts them into the jobs.

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

locals {
  # Each job of jobs.yaml, and the image that it runs.
  jobs = {
    sample-job          = "reads-ids"
    sample-job-packed   = "wrapped"
    sample-job-by-index = "by-index"
  }

  registry = "${var.region}-docker.pkg.dev/${var.project}/${google_artifact_registry_repository.sample.repository_id}"
}

resource "google_project_service" "needed" {
  for_each = toset([
    "artifactregistry.googleapis.com",
    "iam.googleapis.com",
    "logging.googleapis.com",
    "run.googleapis.com",
    "storage.googleapis.com",
  ])
  service            = each.value
  disable_on_destroy = false
}

# --- images ---

resource "google_artifact_registry_repository" "sample" {
  repository_id = "sample"
  location      = var.region
  format        = "DOCKER"
  depends_on    = [google_project_service.needed]
}

# --- identities ---

resource "google_service_account" "worker" {
  account_id   = "sample-worker"
  display_name = "The dispatcher's workers: start, follow and cancel executions"
}

resource "google_service_account" "task" {
  account_id   = "sample-task"
  display_name = "What runs in the containers: reads numbers, writes totals"
}

# --- the jobs ---

resource "google_cloud_run_v2_job" "sample" {
  for_each            = local.jobs
  name                = each.key
  location            = var.region
  deletion_protection = false
  depends_on          = [google_project_service.needed]

  template {
    # 0: as many at once as the region has room for. A fixed number would be the least that an
    # execution may have too, also when one failed id runs again; `limits` in jobs.yaml says it better.
    parallelism = 0
    task_count  = 1

    template {
      service_account = google_service_account.task.email
      # Retries are the dispatcher's, so that they are counted, seen, and limited to what failed.
      max_retries = 0
      # Every run of ours brings its own; this is for a run from the console.
      timeout = "1800s"

      containers {
        image = "${local.registry}/${each.value}:1"
        resources {
          limits = {
            cpu    = "1"
            memory = "512Mi"
          }
        }
        volume_mounts {
          name       = "data"
          mount_path = "/data"
        }
      }

      volumes {
        name = "data"
        gcs {
          bucket    = google_storage_bucket.data.name
          read_only = false
        }
      }
    }
  }

  lifecycle {
    ignore_changes = [template[0].template[0].containers[0].image]
  }
}

# --- storage ---

# Numbers under in/, totals under out/, and ids.txt for the schedule.
resource "google_storage_bucket" "data" {
  name                        = "${var.project}-sample-data"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
}

# Input documents, and receipts and claims where an image writes them: DISPATCHER_STORAGE_URL.
resource "google_storage_bucket" "dispatcher" {
  name                        = "${var.project}-sample-dispatcher"
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

# --- who may do what ---

# To start and to stop, on these jobs only. runWithOverrides is the power to run any argument as the
# task's identity: nobody but the workers has it.
resource "google_project_iam_custom_role" "launcher" {
  role_id     = "sampleLauncher"
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
  for_each = google_cloud_run_v2_job.sample
  name     = each.value.name
  location = var.region
  role     = google_project_iam_custom_role.launcher.id
  member   = google_service_account.worker.member
}

# To follow, on the project: executions nobody owns are looked for with one list over all jobs of the
# region, and log entries are the project's. It only reads.
resource "google_project_iam_custom_role" "follower" {
  role_id     = "sampleFollower"
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

# The list of ids that the schedule takes, and nothing else of the data.
resource "google_storage_bucket_iam_member" "worker_reads_ids" {
  bucket = google_storage_bucket.data.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.worker.member

  condition {
    title      = "ids only"
    expression = "resource.name == 'projects/_/buckets/${google_storage_bucket.data.name}/objects/ids.txt'"
  }
}

resource "google_storage_bucket_iam_member" "task_uses_data" {
  bucket = google_storage_bucket.data.name
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
