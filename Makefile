# cairn's build. Needs Go, git and make; `deps` installs the rest (as root, on
# Debian) and only if something is missing. No service is started by it: a
# policy-rc.d forbids that while packages are installed (bird2 brings one).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build

GO ?= go
# One file that runs on any Linux, and starts sooner. Only the race detector needs C.
export CGO_ENABLED := 0
CAIRN := bin/cairn
# Packages whose tests start processes, guests or network namespaces. They run
# one package at a time and without the race detector, which would slow the
# guests and the load below what the tests are about.
INT_DIRS := chaos/cluster chaos/outage chaos/bench chaos/guest vmhook/machine netplane/kernel netplane/bird chaos/netlab cmd/cairn
INT_PKGS  = $(foreach d,$(INT_DIRS),$(if $(wildcard $(d)/*_test.go),./$(d)))
UNIT_PKGS = $$($(GO) list ./... $(foreach d,$(INT_DIRS),| grep -v '/$(d)$$'))
FUZZ_SECONDS ?= 10
CHAOS_SECONDS ?= 600

.PHONY: build check lint test test-unit test-int deps proto proto-check demo bench chaos fuzz clean

build:
	$(GO) build -trimpath -o bin/ ./cmd/cairn

lint:
	@bad=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$bad" ]; then echo "not gofmt-ed: $$bad" >&2; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

# Before every commit: < 3 minutes.
check: lint
	$(GO) test -short $(UNIT_PKGS)

# Everything CI runs: < 30 minutes on 2 cores. Integration tests take part from
# the first one that exists.
test: deps lint proto-check test-unit $(if $(strip $(INT_PKGS)),test-int)

# Crash points and simulated seeds are many: a sample
# runs with the race detector, all of them without.
MANY := chunk/store chunk/backup chaos/sim
test-unit:
	CGO_ENABLED=1 $(GO) test -race -timeout 8m $$($(GO) list $(UNIT_PKGS) $(foreach d,$(MANY),| grep -v '/$(d)$$'))
	CGO_ENABLED=1 $(GO) test -race -short -timeout 12m $(addprefix ./,$(MANY))
	$(GO) test -timeout 12m $(addprefix ./,$(MANY))

# The S3 server that backups are tested against: a program of its own, so that none
# of its modules become cairn's.
VERSITYGW := .bin/versitygw
$(VERSITYGW):
	GOBIN=$(CURDIR)/.bin $(GO) install github.com/versity/versitygw/cmd/versitygw@v1.8.0

test-int: build $(VERSITYGW)
	@if [ -z "$(INT_PKGS)" ]; then echo "no integration tests found in $(INT_DIRS)" >&2; exit 1; fi
	CAIRN_BIN=$(CURDIR)/$(CAIRN) CAIRN_VERSITYGW=$(CURDIR)/$(VERSITYGW) $(GO) test -p 1 -count=1 -timeout 15m $(INT_PKGS)

# command-or-file:package; nothing is asked of apt when all are there.
NEEDS := cbc:coinor-cbc qemu-system-x86_64:qemu-system-x86 qemu-nbd:qemu-utils nbdkit:nbdkit nbdinfo:libnbd-bin nbdsh:python3-libnbd \
  fio:fio busybox:busybox-static mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs ip:iproute2 nft:nftables \
  cpio:cpio modprobe:kmod losetup:mount protoc:protobuf-compiler bird:bird2

deps:
	@export PATH=$$PATH:/usr/sbin:/sbin; missing=""; \
	for n in $(NEEDS); do command -v "$${n%%:*}" >/dev/null || missing="$$missing $${n##*:}"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ]; then echo "missing packages:$$missing; run as root: apt-get install$$missing" >&2; exit 1; fi; \
	echo "installing:$$missing" >&2; export DEBIAN_FRONTEND=noninteractive; \
	apt-get update -q; \
	if [ ! -e /usr/sbin/policy-rc.d ]; then trap 'rm -f /usr/sbin/policy-rc.d' EXIT; \
	  printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; fi; \
	apt-get install -q -y --no-install-recommends $$missing

# Plugins come from go.mod; PATH makes protoc find exactly those.
proto:
	$(GO) build -o .bin/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	PATH=$(CURDIR)/.bin:$$PATH protoc -I . --go_out=. --go_opt=module=github.com/cairnstore/cairn --go-grpc_out=. --go-grpc_opt=module=github.com/cairnstore/cairn proto/pb/*.proto

# The checked-in code is what the definitions give. Generated into a scratch
# folder, so a failing check changes nothing. The version lines of the headers
# are left out: another protoc with the same result is fine.
proto-check:
	$(GO) build -o .bin/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	PATH=$(CURDIR)/.bin:$$PATH protoc -I . --go_out=$$tmp --go_opt=module=github.com/cairnstore/cairn \
	  --go-grpc_out=$$tmp --go-grpc_opt=module=github.com/cairnstore/cairn proto/pb/*.proto; \
	for f in $$tmp/proto/pb/*.pb.go proto/pb/*.pb.go; do \
	  n=$$(basename $$f); \
	  diff -u -I '^//.*protoc  *v[0-9]' proto/pb/$$n $$tmp/proto/pb/$$n || { echo "proto/pb/$$n is not what its .proto gives; run make proto" >&2; exit 1; }; \
	done

demo: deps build
	$(CAIRN) demo

bench: deps build
	$(CAIRN) bench

# The long run: every planted bug must be found (what was found before, by the
# same state file, is passed over), then real processes under attack.
PLANTED_STATE ?= .cache/planted
chaos: deps build
	@mkdir -p $(dir $(PLANTED_STATE))
	CAIRN_SIM_SEED=$$(date +%s%3N) CAIRN_SIM_SEEDS=5000 $(GO) test -count=1 -timeout 2h -run TestSeeds ./chaos/sim
	CAIRN_SIM_PLANTED='*' CAIRN_SIM_STATE=$(abspath $(PLANTED_STATE)) $(GO) test -count=1 -v -timeout 2h -run 'TestPlanted$$' ./chaos/sim
	CAIRN_BIN=$(CURDIR)/$(CAIRN) CAIRN_CHAOS_SECONDS=$(CHAOS_SECONDS) $(GO) test -count=1 -v -timeout 24h -run Chaos ./chaos/cluster

# One fuzz target at a time, as go test demands.
fuzz:
	@grep -rl --include='*_test.go' '^func Fuzz' . | while read -r f; do \
	  for t in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' "$$f"); do \
	    echo "$$(dirname $$f) $$t"; $(GO) test -run '^$$' -fuzz "^$$t\$$" -fuzztime $(FUZZ_SECONDS)s "$$(dirname $$f)" </dev/null; \
	  done; done

clean:
	rm -rf bin .bin
