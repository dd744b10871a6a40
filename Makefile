# kvmeter. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build

GO    ?= go
VMS   ?= 2
KVM   ?= 1
DEMO  ?= 1
TIME  ?= 30s
REF   ?= HEAD~1
KERNEL ?=
TESTS  ?=
TOOL  := $(GO) tool -modfile=tools/go.mod
LAB   := ./bin/lab
FILES  = git ls-files -co --exclude-standard '*.go' ':!gen/'

# What each kind of work needs from Debian or Ubuntu.
PACKAGES_LAB      := libvirt-daemon libvirt-daemon-driver-qemu qemu-system-x86 qemu-utils gcc libc6-dev binutils xz-utils iproute2 procps
PACKAGES_GENERATE := clang-14 llvm-14 libbpf-dev clang-format-14
PACKAGES_VM       := qemu-system-x86 xz-utils e2fsprogs
PACKAGES_IPMI     := qemu-system-x86 xz-utils ipmitool openipmi
PACKAGES_PUBLISH  := prometheus prometheus-pushgateway gnocchi-api postgresql
PACKAGES_WIRE     := ceilometer-agent-notification
PACKAGES_COMPARE  := python3-ceilometer python3-libvirt rabbitmq-server
PACKAGES_PEERS    := $(PACKAGES_LAB) $(PACKAGES_COMPARE) ceilometer-polling prometheus-libvirt-exporter collectd-core
PACKAGES_TEST     := $(PACKAGES_WIRE) $(PACKAGES_LAB) $(PACKAGES_GENERATE) $(PACKAGES_VM) $(PACKAGES_IPMI) $(PACKAGES_PUBLISH) $(PACKAGES_COMPARE) systemd git python3-oslo.config python3-keystone

# The tests that need root run as root; the compiler does not.
ifneq ($(shell id -u),0)
EXEC := -exec "sudo -E"
endif

export CGO_ENABLED ?= 0
export BPF2GO_CC    := clang-14
export BPF2GO_STRIP := llvm-strip-14

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' Makefile

.PHONY: go
go:
	@scripts/go-version.sh "$(GO)"

.PHONY: build
build: go ## build both programs into bin/ (static, no cgo)
	$(GO) build -trimpath -ldflags='-s -w' -o bin/ ./cmd/kvmeter ./cmd/kvmeter-agent

.PHONY: run
run: go ## set up, boot VMS=2 demo guests if there are none, run kvmeter and show top
	$(MAKE) --no-print-directory build bin/lab
	@VMS=$(VMS) DEMO=$(DEMO) PACKAGES="$(PACKAGES_LAB)" scripts/run.sh

.PHONY: test
test: go ## install what the tests need and run everything, unit to end to end
	@scripts/packages.sh "the tests" $(PACKAGES_TEST)
	$(MAKE) --no-print-directory check test-lab test-duckdb

.PHONY: test-unit
test-unit: go ## tests that need neither root nor packages
	$(GO) test -short -shuffle=on ./...

.PHONY: test-lab
test-lab: go build bin/lab ## all tests, those on real guests, libvirt, RabbitMQ and BPF too (root); what fails runs once more, and is named
	$(TOOL) gotestsum --format pkgname --format-hide-empty-pkg --rerun-fails=1 --rerun-fails-max-failures=5 --packages ./... -- \
		-tags lab -shuffle=on -count=1 -p 1 -timeout 40m $(EXEC)

.PHONY: test-duckdb
test-duckdb: go ## whether DuckDB, which comes by npm into bin/duckdb, reads an export as it was stored
	@if ! command -v npm >/dev/null; then echo "there is no npm to install DuckDB by"; else \
		npm install --silent --no-audit --no-fund --prefix bin/duckdb @duckdb/node-api@1.5.6-r.1 && \
		KVMETER_DUCKDB="$(CURDIR)/bin/duckdb" $(GO) test -count=1 -run DuckDB ./central/export; fi

.PHONY: test-vm
test-vm: go ## the BPF tests in guests with Debian's kernels; KERNEL=6.1, TESTS=regexp for some
	@scripts/packages.sh "the guests" $(PACKAGES_VM)
	$(GO) test -tags lab -count=1 -v -timeout 40m -run 'TestKernels/^$(or $(KERNEL),.*)$$' ./test/vm -args -tests '$(TESTS)'

.PHONY: test-tier
test-tier: go ## a million notifications and ten kills; three notifiers, one killed each 30 s
	@scripts/packages.sh "RabbitMQ" rabbitmq-server
	$(GO) test -tags lab -count=1 -v -timeout 3h ./test/tier -args -notifications 1000000 -deaths 10 -ticks 600 -pace 500ms

.PHONY: test-ipmi
test-ipmi: go ## what a BMC says, in guests with QEMU's, OpenIPMI's and a fake one, against ipmitool
	@scripts/packages.sh "the IPMI lab" $(PACKAGES_IPMI)
	$(GO) test -tags lab -count=1 -v -timeout 10m ./test/ipmi ./collectors/ipmi/...

.PHONY: test-ceilometer
test-ceilometer: go ## Ceilometer's compute agent and ours on the same guests, and a table of how they differ (root)
	@scripts/packages.sh "the comparison" $(PACKAGES_LAB) $(PACKAGES_COMPARE)
	$(GO) test -tags lab -count=1 -v -timeout 10m $(EXEC) -run TestComputeAgents ./test/ceilometer

.PHONY: test-fault
test-fault: go ## real programs killed, cut off and out of disk, ROUNDS=60 times; SEED=n repeats a run (root)
	@scripts/packages.sh "the faults" $(PACKAGES_LAB) rabbitmq-server
	FAULT_ROUNDS=$(or $(ROUNDS),60) FAULT_SEED=$(or $(SEED),$$RANDOM) $(GO) test -tags lab -count=1 -v -timeout 60m $(EXEC) ./test/fault

.PHONY: test-many
test-many: go ## DOMAINS=100 real domains, one hangs, libvirtd is started again twice: whether all others are metered in time (root)
	@scripts/packages.sh "the lab" $(PACKAGES_LAB)
	KVMETER_LAB_DOMAINS=$(or $(DOMAINS),100) $(GO) test -tags lab -count=1 -v -timeout 20m $(EXEC) -run TestLabManyDomains ./agent

.PHONY: test-race
test-race: go ## unit tests under the race detector (needs gcc)
	CGO_ENABLED=1 $(GO) test -race -shuffle=on ./...

.PHONY: test-all
test-all: test test-fault test-race fuzz bench ## everything, with the long parts

.PHONY: fuzz
fuzz: go ## fuzz every decoder for TIME=30s each
	@scripts/fuzz.sh "$(GO)" $(TIME)

.PHONY: bench
bench: go ## run the benchmarks
	$(GO) test -run '^$$' -bench . -benchmem ./...

.PHONY: bench-agent
bench-agent: go build bin/lab ## µs of CPU a domain and poll at 1 Hz, and a cross-check: agent, libvirtd, QEMU (root)
	@scripts/packages.sh "the benchmark" $(PACKAGES_LAB)
	$(GO) test -tags lab -count=1 -timeout 20m $(EXEC) -run '^$$' -bench 'Agent|Crosscheck|QEMUMeters' -benchtime 1x ./test/overhead

.PHONY: bench-bpf
bench-bpf: go ## what BPF costs, as a table: every benchmark BenchmarkCost* (root)
	@scripts/packages.sh "the benchmark" $(PACKAGES_LAB)
	$(GO) test -tags lab -count=1 -p 1 -timeout 20m $(EXEC) -run '^$$' -bench '^BenchmarkCost' -benchtime 1x ./bpf/... ./collectors/... ./test/overhead | scripts/bench-table.sh

.PHONY: bench-central
bench-central: go ## CPU and bytes a sample of the store, its commits, and its queries; KVMETER_BENCH_SAMPLES, KVMETER_BENCH_POINTS
	$(GO) test -run '^$$' -bench 'Append' -benchtime 1x -timeout 60m ./central/store/local
	$(GO) test -run '^$$' -bench 'Commit' -benchtime 600x ./central/store/local
	$(GO) test -run '^$$' -bench 'Newest100|Query|Month' -timeout 60m ./central/store/local

.PHONY: bench-paced
bench-paced: go ## ten minutes of 100,000 samples/s of a million series into the store: CPU, memory, commits, lag
	$(GO) test -run '^$$' -bench Paced -benchtime 6000x -timeout 30m ./central/store/local

.PHONY: bench-at-rest
bench-at-rest: go build bin/lab ## bytes that an agent's real samples take in the store: MINUTES=50 of six guests under load, made a day (root)
	@scripts/packages.sh "the lab" $(PACKAGES_LAB)
	@scripts/at-rest.sh "$(GO)" $(or $(MINUTES),50)

.PHONY: bench-notifier
bench-notifier: go build bin/lab ## µs of CPU a notification, beside Ceilometer's notification agent
	@scripts/packages.sh "the benchmark" rabbitmq-server $(PACKAGES_WIRE)
	$(GO) test -tags lab -count=1 -timeout 20m $(EXEC) -run '^$$' -bench 'Notifier' -benchtime 3x ./test/overhead

.PHONY: bench-compare
bench-compare: go ## compare the benchmarks with REF=HEAD~1 by benchstat
	@scripts/bench-compare.sh "$(GO)" $(REF)

.PHONY: compare
compare: go ## kvmeter, Ceilometer, collectd and the libvirt exporter on the same guests, into docs/comparison.md; VMS=20 ROUNDS=2 TURN=30s (root, 25 minutes)
	@scripts/packages.sh "the comparison" $(PACKAGES_PEERS)
	$(GO) build -o bin/compare ./test/overhead/compare
	$(if $(EXEC),sudo )bin/compare agents --vms $(if $(filter file,$(origin VMS)),20,$(VMS)) --rounds $(or $(ROUNDS),2) --turn $(or $(TURN),30s)
	$(if $(EXEC),sudo )bin/compare accuracy

.PHONY: compare-quick
compare-quick: go ## kvmeter-agent's CPU time beside that of the merge base with BASE=main; fails where it is clearly more than 1.2 times (root, 3 minutes)
	@scripts/packages.sh "the comparison" gcc libc6-dev rabbitmq-server
	$(GO) build -o bin/compare ./test/overhead/compare
	$(if $(EXEC),sudo )bin/compare quick --base $(or $(BASE),main)

.PHONY: packages
packages: go ## build the deb and rpm packages of both programs for amd64 and arm64 into dist/
	packaging/build.sh dist
	@ls -l dist

.PHONY: test-packages
test-packages: go ## install, start, upgrade and purge the packages, in a root and in a guest that boots Debian (root)
	@scripts/packages.sh "the guest" $(PACKAGES_VM) debootstrap
	$(GO) test -tags lab -count=1 -v -timeout 60m $(EXEC) ./test/packages -args -guest

.PHONY: test-chart
test-chart: go ## render the Helm chart, and hold it against Kubernetes' types and the programs' settings
	cd test/chart && $(GO) vet ./... && $(GO) test -count=1 ./...

.PHONY: release
release: go ## packages, SBOM and checksums in dist/; reproducible, licences and vulnerabilities checked
	@scripts/packages.sh "a release" jq
	scripts/release.sh

.PHONY: check
check: go ## formatting, vet, staticcheck, generated files, import rule
	@bad=$$($(FILES) | xargs $(TOOL) gofumpt -l); [ -z "$$bad" ] || { echo "$$bad"; echo "gofumpt: run \`make format\`"; exit 1; } >&2
	$(GO) vet -tags lab ./...
	$(GO) vet -tags testhooks,manual ./cmd/...
	$(TOOL) staticcheck -tags lab ./...
	$(GO) test ./test
	@scripts/generated.sh
	@for f in scripts/*.sh packaging/*.sh packaging/scripts/*.sh .ci/run; do bash -n $$f; done

.PHONY: format
format: ## format the Go and C sources
	$(FILES) | xargs $(TOOL) gofumpt -w
	clang-format-14 -i bpf/*.bpf.c bpf/include/*.h

.PHONY: generate
generate: go ## rebuild the BPF objects and the generated docs
	$(GO) generate ./...

.PHONY: lab-up
lab-up: go bin/lab ## boot VMS=2 Linux guests and KVM=1 ROM guests under a private libvirtd (root)
	@scripts/packages.sh "the lab" $(PACKAGES_LAB)
	$(if $(EXEC),sudo )$(LAB) up --vms $(VMS) --kvm $(KVM)

.PHONY: lab-down
lab-down: bin/lab ## end the lab
	$(if $(EXEC),sudo )$(LAB) down

.PHONY: bin/lab
bin/lab: go
	$(GO) build -o bin/lab ./test/lab/cmd/lab

.PHONY: clean
clean: ## remove what was built
	rm -rf bin dist
