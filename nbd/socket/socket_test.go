package socket

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// pair is two ends of a unix connection.
func pair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	if a, err = net.Dial("unix", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, c := range []net.Conn{a, b} {
			if err := c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
		}
	})
	return a, b
}

// wrapped hides the socket: the outbox goes the way of TLS.
type wrapped struct{ net.Conn }

type counter struct{ n atomic.Int64 }

func (c *counter) Sent() { c.n.Add(1) }

// frame is 8 bytes of length, sender and number, then a body that follows from
// them.
func frame(sender, number, n int) (head, body []byte) {
	head = binary.BigEndian.AppendUint16(nil, uint16(sender))
	head = binary.BigEndian.AppendUint16(head, uint16(number))
	head = binary.BigEndian.AppendUint32(head, uint32(n))
	return head, bytes.Repeat([]byte{byte(sender*31 + number)}, n)
}

// TestFramesOfManySenders: whole frames, each sender's in order, each owner
// told once; through a socket and through a wrapped one.
func TestFramesOfManySenders(t *testing.T) {
	for _, wrap := range []bool{false, true} {
		a, b := pair(t)
		if wrap {
			a = wrapped{a}
		}
		o, err := NewOutbox(a, func(err error) { t.Error(err) })
		if err != nil {
			t.Fatal(err)
		}
		const senders, frames = 8, 300
		var told counter
		var wg sync.WaitGroup
		for s := range senders {
			wg.Go(func() {
				for i := range frames {
					head, body := frame(s, i, (i*i*s)%70000)
					o.Lock()
					o.Add(head, body, &told)
					o.Unlock()
				}
			})
		}
		next := [senders]int{}
		for range senders * frames {
			head := make([]byte, 8)
			if _, err := io.ReadFull(b, head); err != nil {
				t.Fatal(err)
			}
			s, i, n := int(binary.BigEndian.Uint16(head)), int(binary.BigEndian.Uint16(head[2:])), int(binary.BigEndian.Uint32(head[4:]))
			body := make([]byte, n)
			if _, err := io.ReadFull(b, body); err != nil {
				t.Fatal(err)
			}
			if _, want := frame(s, i, n); s >= senders || i != next[s] || !bytes.Equal(body, want) {
				t.Fatalf("wrapped %v: got frame %d of sender %d, want %d", wrap, i, s, next[s])
			}
			next[s]++
		}
		wg.Wait()
		if err := o.Finish(10 * time.Second); err != nil {
			t.Error(err)
		}
		if told.n.Load() != senders*frames {
			t.Errorf("%d owners were told, want %d", told.n.Load(), senders*frames)
		}
	}
}

// TestSendersDoNotWait: a peer that does not read holds nobody up; when it is
// gone, every owner is told and the failure reported once.
func TestSendersDoNotWait(t *testing.T) {
	for _, wrap := range []bool{false, true} {
		a, b := pair(t)
		conn := a
		if wrap {
			conn = wrapped{a}
		}
		var failures, told counter
		o, err := NewOutbox(conn, func(error) { failures.Sent() })
		if err != nil {
			t.Fatal(err)
		}
		body := make([]byte, 1<<20)
		for range 50 { // far beyond what a socket buffers; waiting here would be for ever
			o.Lock()
			o.Add(nil, body, &told)
			o.Unlock()
		}
		if err := o.Finish(time.Millisecond); !errors.Is(err, ErrSlow) {
			t.Errorf("Finish: %v", err)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		if err := o.Finish(10 * time.Second); err == nil || errors.Is(err, ErrSlow) {
			t.Errorf("Finish after the end: %v", err)
		}
		o.Lock()
		o.Add(nil, body, &told)
		o.Unlock()
		if err := o.Finish(10 * time.Second); err == nil {
			t.Error("Finish forgot the failure")
		}
		if told.n.Load() != 51 || failures.n.Load() != 1 {
			t.Errorf("%d of 51 owners told, %d failures", told.n.Load(), failures.n.Load())
		}
	}
}
