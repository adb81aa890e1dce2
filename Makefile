# The few things people try. On a Debian 12 machine with Go, and as root,
# "make demo" and "make test" install what is missing.

GO ?= $(shell command -v go || echo /usr/local/go/bin/go)
# Further words for go test: make test TESTFLAGS=-v
TESTFLAGS ?=
# A directory of sample images that others made; their tests are left out
# where nobody has them.
BACKSTAY_SAMPLES ?= none
export BACKSTAY_SAMPLES
export PATH := $(PATH):$(dir $(GO)):/usr/sbin:/sbin

.PHONY: build demo demo-hyperv windows test check bench fuzz soak need-go

build: need-go ## bin/backstay
	@scripts/need build
	$(GO) build -trimpath -o bin/backstay ./cmd/backstay

demo: need-go ## a real VM is backed up, destroyed and brought back
	@scripts/need demo
	@$(GO) build -trimpath -o bin/backstay ./cmd/backstay
	@bin/backstay demo

demo-hyperv: need-go ## a VM of a simulated Hyper-V host, and a real Samba
	@scripts/need demo-hyperv
	@$(GO) build -trimpath -o bin/backstay ./cmd/backstay
	@$(GO) build -trimpath -o bin/backstay-sim ./cmd/backstay-sim
	@bin/backstay-sim demo --backstay bin/backstay

test: need-go ## every test, real libvirt and QEMU included
	@scripts/need test
	BACKSTAY_MAY_NOT_SKIP=1 $(GO) test -count=1 -timeout 40m -p $$(($$(nproc) + 1)) $(TESTFLAGS) ./...

windows: need-go ## the Windows build starts, backs up and restores, under Wine
	@scripts/need windows
	BACKSTAY_WINE=1 $(GO) test -count=1 -v -run '^TestWindowsBuildUnderWine$$' ./cmd/backstay

check: need-go ## the quick half: no VM, no root, about a minute
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) vet ./...
	$(GO) test -short $(TESTFLAGS) ./...

bench: need-go ## the figures: backstay against its peers on the same bytes
	@scripts/need bench
	$(GO) run ./bench $(BENCHFLAGS)

fuzz: need-go ## every parser for FUZZTIME, 60s by default
	scripts/fuzz $(or $(FUZZTIME),60s)

# Each part ends with a line of what it did and how long that took. SEEDS and
# SOAK make it shorter.
soak: need-go ## what may go wrong seldom, for some hours: SEEDS=10000 simulations, all under the race detector SOAK=10 times
	@scripts/need test
	@echo "== the repository: every order of calls, every failing call, kills at any moment"
	BACKSTAY_SOAK=1 BACKSTAY_SEEDS=$(or $(SEEDS),10000) $(GO) test -count=1 -v -timeout 12h -run '^(TestSimulation|TestKilledAtAnyMoment|TestEveryOperationBesideEveryOther|TestEveryCallFails)$$' ./internal/repo
	BACKSTAY_SOAK=1 $(GO) test -count=1 -v -timeout 12h -run '^TestNothingIsLost$$' ./internal/repo/internal/fencing
	@echo "== a Hyper-V host: a fault at every request"
	BACKSTAY_SOAK=1 $(GO) test -count=1 -timeout 2h -run '^TestFaultAtEveryRequest$$' ./internal/hypervisor/hyperv
	@echo "== guests that change their hypervisor, and boot there"
	BACKSTAY_SOAK=1 BACKSTAY_MAY_NOT_SKIP=1 $(GO) test -count=1 -timeout 2h -run '^TestGuestsChangeTheirHypervisor$$' ./cmd/backstay
	@echo "== the samples: the SHA-256 of every byte"
	BACKSTAY_SOAK=1 $(GO) test -count=1 -timeout 2h -run '^TestSamples' ./internal/image/...
	@echo "== in pure Go"
	CGO_ENABLED=0 $(GO) test -count=1 -timeout 2h ./internal/repo/... ./internal/image/qcow2
	@echo "== the race detector"
	BACKSTAY_MAY_NOT_SKIP=1 $(GO) test -count=$(or $(SOAK),10) -timeout 12h -race $$(cat .ci/race) ./internal/image/convert ./internal/image/raw

need-go:
	@command -v $(GO) >/dev/null || { echo "Go is missing: see https://go.dev/doc/install" >&2; exit 1; }
