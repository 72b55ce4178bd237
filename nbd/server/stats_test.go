package server_test

import (
	"testing"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/nbd/server"
	"github.com/cairnstore/cairn/proto/status"
)

// TestStats: each request counts once, also when its connection is gone.
func TestStats(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m, "w": m}})
	c := dial(t, s.uri("v"), nil)
	for range 3 {
		_, err := c.WriteAt(make([]byte, 8192), 0)
		must(t, err)
	}
	_, err := c.ReadAt(make([]byte, 100), 5)
	must(t, err)
	must(t, c.Flush())
	must(t, c.Trim(0, 4096))
	must(t, c.WriteZeroes(0, 4096, 0))
	must(t, c.Cache(0, 4096))
	_, err = c.BlockStatus(0, 4096)
	must(t, err)
	wantKind(t, do(c, &client.Req{Type: nbd.CmdRead, Off: 1 << 20, Data: make([]byte, 9)}), status.Invalid) // at the door
	m.mu.Lock()
	m.refuse = status.IO
	m.mu.Unlock()
	wantKind(t, do(c, &client.Req{Type: nbd.CmdWrite, Data: make([]byte, 9)}), status.IO) // in the volume
	m.mu.Lock()
	m.refuse = status.OK
	m.mu.Unlock()
	check := func(conns int) {
		t.Helper()
		x := s.Stats("v")
		if x.Connections != conns || x.InFlight != 0 || x.InFlightBytes != 0 {
			t.Errorf("%d connections, %d requests of %d bytes in flight", x.Connections, x.InFlight, x.InFlightBytes)
		}
		for class, want := range map[nbd.OpClass]nbd.OpStats{
			nbd.ClassWrite: {Done: 4, Failed: 1, Bytes: 3 * 8192}, nbd.ClassRead: {Done: 2, Failed: 1, Bytes: 100}, nbd.ClassFlush: {Done: 1},
			nbd.ClassTrim: {Done: 1, Bytes: 4096}, nbd.ClassZero: {Done: 1, Bytes: 4096}, nbd.ClassCache: {Done: 1, Bytes: 4096}, nbd.ClassStatus: {Done: 1, Bytes: 4096},
		} {
			got := x.Ops[class]
			if got.Done != want.Done || got.Failed != want.Failed || got.Bytes != want.Bytes || got.Latency.Count() != want.Done {
				t.Errorf("%s: %d done, %d failed, %d bytes, %d in the histogram; want %+v", class, got.Done, got.Failed, got.Bytes, got.Latency.Count(), want)
			}
		}
	}
	waitFor(t, "the last reply to be accounted for", func() bool { return s.Stats("v").InFlight == 0 })
	check(1)
	must(t, c.Close())
	waitFor(t, "the connection to end", func() bool { return s.All() == 0 })
	check(0)
	if x := s.Stats("w"); x.Ops[nbd.ClassWrite].Done != 0 {
		t.Errorf("another export: %+v", x)
	}
	m.hold()
	held := dial(t, s.uri("v"), nil)
	done := make(chan struct{})
	held.Start(&client.Req{Type: nbd.CmdWrite, Data: make([]byte, 12345), Done: func(*client.Req) { close(done) }})
	waitFor(t, "the write to arrive", func() bool { return m.kept() == 1 })
	if x := s.Stats("v"); x.InFlight != 1 || x.InFlightBytes != 12345 {
		t.Errorf("%d requests, %d bytes in flight", x.InFlight, x.InFlightBytes)
	}
	m.letGo()
	<-done
}
