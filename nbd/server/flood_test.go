package server_test

import (
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/nbd/server"
)

// floodEnv asks for the long version: 1,000 half-open connections and
// 1,000,000 malformed requests, with the other client's latency judged.
const floodEnv = "CAIRN_NBD_FLOOD"

// TestFlood: idle half-open connections and malformed requests cost little
// memory, and somebody else little time.
func TestFlood(t *testing.T) {
	idle, requests, long := 200, 40_000, os.Getenv(floodEnv) != ""
	if long {
		idle, requests = 1000, 1_000_000
	}
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20), "other": newMemory(64 << 20)}, MaxConns: idle + 24, Handshake: 5 * time.Minute})
	c := dial(t, s.uri("other"), nil)
	load := func(stop *atomic.Bool, most int) []time.Duration {
		var took []time.Duration
		b := make([]byte, 4096)
		for i := 0; i < most && !stop.Load(); i++ {
			at := time.Now()
			if _, err := c.WriteAt(b, int64(i)*7919%(1<<14)*4096); err != nil {
				t.Fatal(err)
			}
			took = append(took, time.Since(at))
		}
		return took
	}
	var never atomic.Bool
	calm := load(&never, 20_000)
	before := residentBytes(t)
	for i := range idle {
		nc := raw(t, "unix", s.sock)
		if i%2 == 0 { // half of them get as far as the greeting
			mustWrite(t, nc, []byte{0, 0, 0, 3})
		}
	}
	waitFor(t, "all to be connected", func() bool { return s.All() > idle })
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		defer stop.Store(true)
		flood(t, rawTransmission(t, "unix", s.sock, "v"), requests)
	})
	harried := load(&stop, 1<<30)
	wg.Wait()
	grown := int64(residentBytes(t)) - int64(before)
	p99 := func(d []time.Duration) time.Duration {
		slices.Sort(d)
		return d[len(d)*99/100]
	}
	a, b := p99(calm), p99(harried)
	t.Logf("%d half-open connections, %d malformed requests: %d KiB more resident; somebody else's p99 %v, before %v (%.2f×, %d writes)",
		idle, requests, grown>>10, b, a, float64(b)/float64(a), len(harried))
	if grown > 64<<20 {
		t.Errorf("the process has grown by %d bytes", grown)
	}
	if long && b > 2*a && b > time.Millisecond {
		t.Errorf("somebody else's p99 went from %v to %v", a, b)
	}
	if n := s.Stats("v").Ops[nbd.ClassWrite].Failed; n == 0 {
		t.Error("no malformed request was refused")
	}
}

// flood sends malformed requests of every sort, and reads their answers.
func flood(t *testing.T, nc net.Conn, requests int) {
	const each = 100
	var b []byte
	replies := 0
	for i := range each {
		r := nbd.Request{Type: uint16(i % 9), Flags: 1 << 14, Off: 1<<64 - 1, Len: 4, Cookie: uint64(i)}
		switch r.Type {
		case nbd.CmdDisc:
			continue
		case nbd.CmdWrite:
			b = append(nbd.AppendRequest(b, r), "data"...)
		default:
			b = nbd.AppendRequest(b, r)
		}
		replies += nbd.SimpleSize
	}
	answers := make([]byte, replies)
	must(t, nc.SetDeadline(time.Now().Add(5*time.Minute)))
	for range requests / each {
		mustWrite(t, nc, b)
		mustRead(t, nc, answers)
	}
}

// residentBytes is this process's resident memory.
func residentBytes(t *testing.T) uint64 {
	t.Helper()
	heap() // a collection first
	text, err := os.ReadFile("/proc/self/status")
	must(t, err)
	for _, line := range strings.Split(string(text), "\n") {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			kb, err := strconv.ParseUint(f[1], 10, 64)
			must(t, err)
			return kb << 10
		}
	}
	t.Fatalf("no VmRSS in %s", text)
	return 0
}

// FuzzConnection sends anything to a server, from the first byte on or once
// transmission has begun. The connection comes to an end, the server lives,
// and nothing is written where no write was asked for.
func FuzzConnection(f *testing.F) {
	hello := []byte{0, 0, 0, 3}
	f.Add(false, append(append(hello, nbd.AppendOption(nil, nbd.OptGo, nbd.AppendInfoRequest(nil, "v"))...), write4k(1, 1)...))
	f.Add(false, append(hello, nbd.AppendOption(nil, nbd.OptSetMeta, nbd.AppendMetaRequest(nil, "v", nbd.ContextAllocation))...))
	f.Add(true, nbd.AppendRequest(write4k(1, 1), nbd.Request{Type: nbd.CmdBlockStatus, Len: 4096}))
	f.Add(true, nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdWriteZeroes, Flags: nbd.CmdNoHole, Len: 1 << 20}))
	m := newMemory(1 << 20)
	s := serve(f, server.Config{Exports: exports{"v": m}, Unread: 5 * time.Second})
	alive, err := client.Dial(f.Context(), s.uri("v"), nil)
	must(f, err)
	f.Cleanup(func() { must(f, alive.Close()) })
	f.Fuzz(func(t *testing.T, transmission bool, b []byte) {
		var nc net.Conn
		if transmission {
			nc = rawTransmission(t, "unix", s.sock, "v")
		} else {
			nc = raw(t, "unix", s.sock)
		}
		if _, err := nc.Write(b); err == nil {
			if err := nc.(*net.UnixConn).CloseWrite(); err != nil && !isReset(err) {
				t.Error(err)
			}
		}
		gone(t, nc)
		if _, err := alive.ReadAt(make([]byte, 16), 0); err != nil {
			t.Fatalf("the server does not serve any more: %v", err)
		}
		must(t, nc.Close())
	})
}
