package server_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/nbd/server"
	"github.com/cairnstore/cairn/proto/status"
)

// TestPatientRidesOutRestarts: our own client meets no error and loses nothing
// while the server is drained, or cut, and replaced on the same socket.
func TestPatientRidesOutRestarts(t *testing.T) {
	m := newMemory(4 << 20)
	sock := filepath.Join(t.TempDir(), "s")
	start := func() (end func(cut bool)) {
		l, err := server.ListenUnix(server.Socket{Path: sock})
		must(t, err)
		s := server.New(server.Config{Exports: exports{"v": m}})
		served := make(chan error, 1)
		go func() { served <- s.Serve(l) }()
		return func(cut bool) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if cut {
				cancel()
			}
			if err := s.Close(ctx); err != nil && !cut {
				t.Error(err)
			}
			wantKindOf(t, <-served)
		}
	}
	end := start()
	p, err := client.DialPatient(context.Background(), "nbd+unix:///v?socket="+sock, nil, 20*time.Second)
	must(t, err)
	var wg sync.WaitGroup
	var stop atomic.Bool
	var done atomic.Uint64
	for g := range uint64(8) { // each has blocks of its own
		wg.Go(func() {
			r := rand.New(rand.NewPCG(g, 1))
			b, got := make([]byte, 4096), make([]byte, 4096)
			for i := uint64(1); !stop.Load(); i++ {
				off := int64(r.Uint64N(128)*8+g) * 4096
				be.PutUint64(b, i<<8|g)
				if _, err := p.WriteAt(b, off); err != nil {
					t.Errorf("write: %v", err)
					return
				}
				if _, err := p.ReadAt(got, off); err != nil || be.Uint64(got) != i<<8|g {
					t.Errorf("read %x instead of %x: %v", be.Uint64(got), i<<8|g, err)
					return
				}
				done.Add(1)
			}
		})
	}
	for i := range 8 {
		before := done.Load()
		waitFor(t, "the load to run", func() bool { return done.Load() > before+100 })
		end(i%2 == 1)
		end = start()
	}
	stop.Store(true)
	wg.Wait()
	if p.Lost() < 8 {
		t.Errorf("the connection was lost %d times", p.Lost())
	}
	must(t, p.Flush())
	must(t, p.Close())
	if _, err := p.WriteAt([]byte{1}, 0); !errors.Is(err, status.Unavailable) {
		t.Errorf("after Close: %v", err)
	}
	end(false)
}

// TestPatientGivesUp: in time, every request once, and for good.
func TestPatientGivesUp(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	p, err := client.DialPatient(context.Background(), s.uri("v"), nil, 50*time.Millisecond)
	must(t, err)
	m.hold()
	ended := make(chan error, 32)
	for range 16 {
		p.Start(&client.Req{Type: nbd.CmdWrite, Data: make([]byte, 512), Done: func(r *client.Req) { ended <- r.Err }})
	}
	waitFor(t, "the writes to arrive", func() bool { return m.kept() == 16 })
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Close(ctx); err == nil {
		t.Error("a cut with requests in flight is no error")
	}
	for range 16 {
		if err := <-ended; !errors.Is(err, status.Unavailable) {
			t.Errorf("a write ended with %v", err)
		}
	}
	m.letGo()
	if _, err := p.ReadAt(make([]byte, 1), 0); !errors.Is(err, status.Unavailable) {
		t.Errorf("afterwards: %v", err)
	}
	if len(ended) != 0 {
		t.Error("a write ended twice")
	}
	must(t, p.Close())
}
