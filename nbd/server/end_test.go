package server_test

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/server"
	"github.com/cairnstore/cairn/proto/status"
)

func write4k(cookie, block uint64) []byte {
	b := nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdWrite, Off: block * 4096, Len: 4096, Cookie: cookie})
	d := make([]byte, 4096)
	d[0] = byte(cookie)
	return append(b, d...)
}

// TestDropFinishesThenRefuses: what was taken in is answered, what comes later
// gets ESHUTDOWN, then the connection ends; other exports stay.
func TestDropFinishesThenRefuses(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m, "other": newMemory(1 << 20)}})
	idle, busy, other := rawTransmission(t, "unix", s.sock, "v"), rawTransmission(t, "tcp", s.tcp, "v"), rawTransmission(t, "unix", s.sock, "other")
	m.hold()
	mustWrite(t, busy, write4k(1, 0))
	waitFor(t, "the write to arrive", func() bool { return m.kept() == 1 })
	s.Drop("v")
	gone(t, idle)
	mustWrite(t, busy, write4k(2, 1))
	if errno, cookie := simple(t, busy); errno != 108 || cookie != 2 {
		t.Errorf("a late write: error %d for %d", errno, cookie)
	}
	m.letGo()
	if errno, cookie := simple(t, busy); errno != 0 || cookie != 1 {
		t.Errorf("the write in flight: error %d for %d", errno, cookie)
	}
	gone(t, busy)
	if m.at(0, 1)[0] != 1 || m.at(4096, 1)[0] != 0 {
		t.Error("the volume does not hold exactly the write that was in flight")
	}
	mustWrite(t, other, write4k(3, 0))
	simple(t, other)
}

// TestDropOfAHungVolumeEndsInTime: what never comes back does not keep its
// connection.
func TestDropOfAHungVolumeEndsInTime(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}, Unread: 100 * time.Millisecond})
	nc := rawTransmission(t, "unix", s.sock, "v")
	m.hold()
	mustWrite(t, nc, write4k(1, 0))
	waitFor(t, "the write to arrive", func() bool { return m.kept() == 1 })
	s.Drop("v")
	gone(t, nc)
	m.letGo() // comes back to a connection that is gone
	waitFor(t, "the connection to be forgotten", func() bool { return s.All() == 0 })
}

// TestCloseDrains: in flight is answered, unread stays unanswered and undone,
// so that a client that reconnects may send it again.
func TestCloseDrains(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	half := greeted(t, raw(t, "unix", s.sock))
	idle, busy := rawTransmission(t, "tcp", s.tcp, "v"), rawTransmission(t, "unix", s.sock, "v")
	m.hold()
	mustWrite(t, busy, write4k(1, 0))
	waitFor(t, "the write to arrive", func() bool { return m.kept() == 1 })
	done := make(chan error, 1)
	go func() { done <- s.Close(context.Background()) }()
	gone(t, idle)
	gone(t, half)
	waitFor(t, "the busy one to be told", func() bool { return s.Leaving() == s.All() })
	mustWrite(t, busy, write4k(2, 1))
	m.letGo()
	if errno, cookie := simple(t, busy); errno != 0 || cookie != 1 {
		t.Errorf("the write in flight: error %d for %d", errno, cookie)
	}
	if n, err := busy.Read(make([]byte, 16)); err == nil {
		t.Errorf("%d bytes more came", n)
	}
	must(t, <-done)
	if m.at(0, 1)[0] != 1 || m.at(4096, 1)[0] != 0 {
		t.Error("the volume does not hold exactly the write that was in flight")
	}
	if _, err := net.Dial("unix", s.sock); err == nil {
		t.Error("the socket still answers")
	}
}

func TestCloseGivesUpWithItsContext(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	nc := rawTransmission(t, "unix", s.sock, "v")
	m.hold()
	mustWrite(t, nc, write4k(1, 0))
	waitFor(t, "the write to arrive", func() bool { return m.kept() == 1 })
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := s.Close(ctx); !errors.Is(err, status.Timeout) {
		t.Errorf("Close: %v", err)
	}
	gone(t, nc)
	m.letGo()
}

// TestStoodStill: requests that lay in the socket while the process was
// stopped are never executed, whichever notices first, reader or heart.
func TestStoodStill(t *testing.T) {
	for _, heartFirst := range []bool{false, true} {
		m := newMemory(1 << 20)
		s := serve(t, server.Config{Exports: exports{"v": m}, Unread: time.Hour})
		nc, idle := rawTransmission(t, "unix", s.sock, "v"), rawTransmission(t, "unix", s.sock, "v")
		mustWrite(t, nc, write4k(1, 0))
		simple(t, nc)
		s.StandStill(2 * time.Hour)
		if heartFirst {
			s.Pulse()
		}
		mustWrite(t, nc, write4k(2, 0))
		gone(t, nc)
		s.Pulse()
		mustWrite(t, idle, write4k(3, 0))
		gone(t, idle)
		if m.at(0, 1)[0] != 1 {
			t.Error("a write from before the standstill has landed")
		}
		again := rawTransmission(t, "unix", s.sock, "v")
		mustWrite(t, again, write4k(4, 0))
		if errno, _ := simple(t, again); errno != 0 || m.at(0, 1)[0] != 4 {
			t.Errorf("a new connection: error %d", errno)
		}
	}
}

// TestUnreadTooLong: a volume that does not take a batch for longer than
// Unread costs the connection, and what was sent meanwhile is not executed.
func TestUnreadTooLong(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}, Unread: 200 * time.Millisecond})
	nc := rawTransmission(t, "unix", s.sock, "v")
	block := make(chan struct{})
	m.mu.Lock()
	m.blocked = block
	m.mu.Unlock()
	mustWrite(t, nc, write4k(1, 0))
	mustWrite(t, nc, write4k(2, 1))
	waitFor(t, "Unread to pass", after(400*time.Millisecond))
	mustWrite(t, nc, write4k(3, 2))
	m.mu.Lock()
	m.blocked = nil
	m.mu.Unlock()
	close(block)
	if _, err := io.ReadAll(nc); isTimeout(err) {
		t.Fatal("the connection was not closed")
	}
	if m.at(2*4096, 1)[0] != 0 {
		t.Error("a write that lay unread has landed")
	}
	waitFor(t, "the connection to end", func() bool { return s.All() == 0 })
}

// TestBudgetOfRequests: more requests than a connection may have wait in the
// socket, not in memory.
func TestBudgetOfRequests(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}, MaxRequests: 8})
	nc := rawTransmission(t, "unix", s.sock, "v")
	m.hold()
	for i := range uint64(20) {
		mustWrite(t, nc, write4k(i, i))
	}
	waitFor(t, "eight to arrive", func() bool { return m.kept() == 8 })
	if requests, _ := s.Held(); requests != 8 {
		t.Errorf("%d requests are held", requests)
	}
	m.letGo()
	seen := map[uint64]bool{}
	for range 20 {
		errno, cookie := simple(t, nc)
		if errno != 0 || seen[cookie] {
			t.Fatalf("error %d for %d", errno, cookie)
		}
		seen[cookie] = true
	}
}

// TestProvisioningOf4GiB is one batch of writes that share one page of zeros.
func TestProvisioningOf4GiB(t *testing.T) {
	v := &counting{size: 8 << 30}
	s := serve(t, server.Config{Exports: exports{"v": v}})
	nc := rawTransmission(t, "unix", s.sock, "v")
	before := heap()
	mustWrite(t, nc, nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdWriteZeroes, Flags: nbd.CmdNoHole, Off: 4097, Len: 1<<32 - 1, Cookie: 3}))
	if errno, cookie := simple(t, nc); errno != 0 || cookie != 3 {
		t.Errorf("error %d for %d", errno, cookie)
	}
	if n, k := v.bytes.Load(), v.batches.Load(); n != 1<<32-1 || k != 1 {
		t.Errorf("%d bytes were written in %d batches", n, k)
	}
	if grown := int64(heap()) - int64(before); grown > 8<<20 {
		t.Errorf("the heap has grown by %d bytes", grown)
	}
}
