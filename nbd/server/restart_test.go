package server_test

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/cairnstore/cairn/nbd/server"
	"github.com/cairnstore/cairn/proto/status"
)

// TestQEMURidesOutRestarts: QEMU with reconnect-delay meets no error while the
// server under its load is drained, or cut, and replaced on the same socket.
func TestQEMURidesOutRestarts(t *testing.T) {
	m := newMemory(16 << 20)
	sock := filepath.Join(t.TempDir(), "s")
	start := func() *server.Server {
		l, err := server.ListenUnix(server.Socket{Path: sock})
		must(t, err)
		s := server.New(server.Config{Exports: exports{"v": m}})
		served := make(chan error, 1)
		go func() { served <- s.Serve(l) }()
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			must(t, s.Close(ctx))
			wantKind(t, <-served, status.Shutdown)
		})
		return s
	}
	s := start()
	type result struct {
		out, stderr string
		err         error
	}
	done := make(chan result, 1)
	go func() {
		opts := "driver=nbd,server.type=unix,server.path=" + sock + ",export=v,reconnect-delay=30"
		out, stderr, err := attempt(t, "qemu-img", "bench", "--image-opts", "-t", "none", "-w", "-c", "150000", "-d", "16", "-s", "4k", opts)
		done <- result{out, stderr, err}
	}()
	for i := range 6 {
		before := m.bytesWritten()
		waitFor(t, "the load to run", func() bool { return m.bytesWritten() > before+2000*4096 || len(done) == 1 })
		if len(done) == 1 {
			t.Fatalf("the load ended at restart %d: too short to show anything", i)
		}
		ctx, cancel := context.WithCancel(context.Background())
		if i%2 == 1 {
			cancel() // cut at once, as by kill -9
		}
		err := s.Close(ctx)
		cancel()
		if i%2 == 0 {
			must(t, err)
		}
		s = start()
	}
	r := <-done
	if r.err != nil {
		t.Errorf("qemu-img bench: %v\n%s%s", r.err, r.out, r.stderr)
	}
}
