package stream

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// pair returns the two ends of a TCP connection.
func pair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
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

// request makes a request whose fields and data follow from n, so that the
// other end can tell whether it came whole.
func request(n uint64) *wire.Request {
	r := rand.New(rand.NewPCG(n, 1))
	q := &wire.Request{Kind: wire.Flush, ID: n, Version: ids.Version(r.Uint64())}
	switch n % 4 {
	case 0:
		q.Kind, q.Count = wire.Write, 1+uint32(r.IntN(3))
		if n%100 == 0 {
			q.Count = 100 // larger than a slab
		}
		q.Data = bytes.Repeat([]byte{byte(n), byte(n >> 8), byte(n >> 16), 7}, int(q.Count)*ids.BlockSize/4)
		q.Sums = make([]uint32, q.Count)
	case 1:
		q.Kind = wire.Install
		q.Entries = make([]wire.Entry, r.IntN(10))
		if n%100 == 1 {
			q.Entries = make([]wire.Entry, 10_000) // a body larger than a slab
		}
		for i := range q.Entries {
			q.Entries[i] = wire.Entry{Block: ids.Block(i), Kind: wire.EntryHole}
		}
	}
	return q
}

func encode(q *wire.Request) []byte { return append(wire.AppendRequest(nil, q), q.Data...) }

// Many goroutines append and flush while the peer reads in bites. Each frame
// comes whole, and those of one goroutine in its order.
func TestCombiningFlushKeepsFramesWholeAndInOrder(t *testing.T) {
	for name, wrap := range map[string]func(net.Conn) net.Conn{
		"straight to the socket": func(c net.Conn) net.Conn { return c },
		"by a goroutine":         func(c net.Conn) net.Conn { return struct{ net.Conn }{c} },
	} {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t)
			o, err := NewOutbox(wrap(a))
			if err != nil {
				t.Fatal(err)
			}
			const writers, each = 8, 150
			var wg sync.WaitGroup
			for w := range uint64(writers) {
				wg.Add(1)
				go func() {
					defer wg.Done()
					for i := range uint64(each) {
						q := request(w*each + i)
						switch i % 3 {
						case 0:
							o.Frames(encode(q))
						default:
							o.Requests(q)
							clear(q.Data) // it was copied
						}
						o.Flush()
					}
				}()
			}
			next := [writers]uint64{}
			r := NewReader(iotest.HalfReader(b))
			for range writers * each {
				f := frame(t, r)
				got := append(append(make([]byte, 0, 1<<20), f.Body...), f.Data...)
				w := f.ID / each
				if f.ID != w*each+next[w] {
					t.Fatalf("writer %d: frame %d came, want %d", w, f.ID-w*each, next[w])
				}
				next[w]++
				if !bytes.Equal(got, encode(request(f.ID))[wire.HeaderBytes:]) {
					t.Fatalf("frame %d is not what was appended", f.ID)
				}
			}
			wg.Wait()
			if err := o.Drained(0); err != nil {
				t.Fatal(err)
			}
			o.Stop(io.EOF)
		})
	}
}

func frame(t *testing.T, r *Reader) Frame {
	t.Helper()
	for {
		f, ok, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			return f
		}
		if err := r.Fill(); err != nil {
			t.Fatal(err)
		}
	}
}

// A peer that reads nothing: Flush returns, the rest waits, Stop ends it.
func TestFullSocketKeepsNobodyWaiting(t *testing.T) {
	a, b := pair(t)
	o, err := NewOutbox(a)
	if err != nil {
		t.Fatal(err)
	}
	const total = 32 << 20 // more than both kernel buffers
	big := make([]byte, total/64)
	for range 64 {
		o.Frames(big)
		o.Flush()
	}
	if n := o.Pending(); n == 0 || n > total {
		t.Fatalf("%d bytes pending", n)
	}
	ended := errors.New("ended")
	drained := make(chan error, 1)
	go func() { drained <- o.Drained(0) }()
	for !waitsIn("(*Outbox).Drained") {
		runtime.Gosched()
	}
	o.Fail(ended)
	if err := <-drained; err != ended {
		t.Fatalf("got %v", err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	o.Stop(ended)
	o.Requests(request(0))
	o.Replies(&wire.Reply{Kind: wire.Ping})
	o.Flush()
	if n := o.Pending(); n != 0 {
		t.Fatalf("%d bytes pending after the end", n)
	}
	if n, err := io.Copy(io.Discard, b); err == nil && n == total {
		t.Fatal("everything was written: the socket was never full")
	}
}

// waitsIn reports whether a goroutine waits for a condition inside function f.
func waitsIn(f string) bool {
	b := make([]byte, 1<<20)
	for _, g := range strings.Split(string(b[:runtime.Stack(b, true)]), "\n\n") {
		if strings.Contains(g, "[sync.Cond.Wait") && strings.Contains(g, f) {
			return true
		}
	}
	return false
}

// A write error reaches who waits, and later frames are dropped.
func TestBrokenConnection(t *testing.T) {
	a, _ := pair(t)
	o, err := NewOutbox(a)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	o.Requests(request(0))
	o.Flush()
	if err := o.Drained(0); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("got %v", err)
	}
	o.Stop(nil)
}

// Corked frames go out together at the end.
func TestCork(t *testing.T) {
	a, b := pair(t)
	o, err := NewOutbox(a)
	if err != nil {
		t.Fatal(err)
	}
	o.Cork()
	o.Requests(request(2))
	o.Flush()
	if o.Pending() != len(encode(request(2))) {
		t.Fatalf("%d bytes pending", o.Pending())
	}
	o.Requests(request(3))
	o.Uncork()
	r := NewReader(b)
	for id := uint64(2); id < 4; id++ {
		if f := frame(t, r); f.ID != id {
			t.Fatalf("frame %d, want %d", f.ID, id)
		}
	}
	o.Stop(io.EOF)
}

// However a stream is cut into reads, the frames are the same; the buffer grows
// for a large frame, stays within its bound and shrinks again.
func TestReaderCutsAnyStream(t *testing.T) {
	var all []byte
	const n = 120
	for i := range uint64(n) {
		all = append(all, encode(request(i))...)
	}
	for name, wrap := range map[string]func(io.Reader) io.Reader{
		"whole":           func(r io.Reader) io.Reader { return r },
		"bytes":           iotest.OneByteReader,
		"half":            iotest.HalfReader,
		"error with data": iotest.DataErrReader,
	} {
		r := NewReader(wrap(bytes.NewReader(all)))
		for i := range uint64(n) {
			f := frame(t, r)
			if q, err := f.Request(); err != nil || !bytes.Equal(encode(q), encode(request(i))) {
				t.Fatalf("%s: frame %d is not what was sent (%v)", name, i, err)
			}
			if len(r.buf) > max(maxBuffer, 500_000) {
				t.Fatalf("%s: a buffer of %d bytes", name, len(r.buf))
			}
		}
		if _, ok, err := r.Next(); ok || err != nil {
			t.Fatalf("%s: %v %v after the last frame", name, ok, err)
		}
		if err := r.Fill(); err != io.EOF {
			t.Fatalf("%s: ended with %v", name, err)
		}
	}
	ping := encode(&wire.Request{Kind: wire.Ping})
	pr, pw := io.Pipe()
	r := NewReader(pr)
	r.buf = make([]byte, MaxFrame)
	go func() {
		for range 20 * shrinkAfter {
			if _, err := pw.Write(ping); err != nil {
				t.Error(err)
			}
		}
	}()
	for range 20 * shrinkAfter {
		frame(t, r)
	}
	if len(r.buf) != minBuffer {
		t.Fatalf("the buffer still has %d bytes", len(r.buf))
	}
}

func TestReaderEndInsideAFrame(t *testing.T) {
	b := encode(request(4))
	for cut := 1; cut < len(b); cut += 1 + cut/20 {
		r := NewReader(bytes.NewReader(b[:cut]))
		var err error
		for err == nil {
			var ok bool
			if _, ok, err = r.Next(); ok {
				t.Fatalf("a frame of %d bytes out of %d", len(b), cut)
			}
			if err == nil {
				err = r.Fill()
			}
		}
		if err != io.ErrUnexpectedEOF {
			t.Fatalf("cut at %d: %v", cut, err)
		}
	}
}

// No bytes make the reader take more memory than a frame, or give a frame whose
// parts are not of the lengths its header says.
func FuzzReader(f *testing.F) {
	f.Add(encode(request(4)), 100)
	f.Add(append(encode(request(5)), encode(request(2))...), 7)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		cut = min(max(cut, 0), len(b))
		r := NewReader(io.MultiReader(bytes.NewReader(b[:cut]), bytes.NewReader(b[cut:])))
		for {
			fr, ok, err := r.Next()
			if err != nil {
				return
			}
			if ok {
				if len(fr.Body) != fr.BodyLen || len(fr.Data) != fr.DataLen {
					t.Fatal("a frame of other lengths")
				}
				if q, err := fr.Request(); err == nil && Cost(q) < len(q.Data) {
					t.Fatal("a cost below the data")
				}
				_, _ = fr.Reply()
				continue
			}
			if r.Fill() != nil {
				return
			}
			if len(r.buf) > MaxFrame {
				t.Fatalf("a buffer of %d bytes", len(r.buf))
			}
		}
	})
}
