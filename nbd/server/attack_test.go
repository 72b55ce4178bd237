package server_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/nbd/server"
)

// bystander uses a volume until it is told to stop; whatever others do to the
// server, it must not meet an error or a wrong byte.
func bystander(t *testing.T, uri string) {
	c := dial(t, uri, nil)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		r, buf, got := rand.New(rand.NewPCG(1, 2)), make([]byte, 16<<10), make([]byte, 16<<10)
		for i := byte(1); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			off := int64(r.IntN(int(c.Size()) - len(buf)))
			for k := range buf {
				buf[k] = i
			}
			if _, err := c.WriteAt(buf, off); err != nil {
				t.Errorf("bystander: %v", err)
				return
			}
			if _, err := c.ReadAt(got, off); err != nil || !bytes.Equal(got, buf) {
				t.Errorf("bystander: reads something else: %v", err)
				return
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-done })
}

// heap is what is allocated after a collection.
func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestGarbageEndsOnlyItsOwnConnection(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m, "other": newMemory(1 << 20)}})
	bystander(t, s.uri("other"))
	request := func(r nbd.Request) []byte { return nbd.AppendRequest(nil, r) }
	option := func(id, length uint32) []byte {
		b := nbd.AppendOption(nil, id, nil)
		be.PutUint32(b[12:], length)
		return b
	}
	before := heap()
	for what, b := range map[string][]byte{
		"unknown client flags":         {0xff, 0, 0, 3},
		"a request before any option":  append([]byte{0, 0, 0, 3}, request(nbd.Request{Type: nbd.CmdWrite, Len: 4096})...),
		"an option of 4 GiB":           append([]byte{0, 0, 0, 3}, option(nbd.OptGo, 1<<32-1)...),
		"an unknown option of 4 GiB":   append([]byte{0, 0, 0, 3}, option(4711, 1<<32-1)...),
		"an export name of 4 GiB":      append([]byte{0, 0, 0, 3}, option(nbd.OptExportName, 1<<32-1)...),
		"http":                         []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"a request after a failed go":  append(append([]byte{0, 0, 0, 3}, nbd.AppendOption(nil, nbd.OptGo, nbd.AppendInfoRequest(nil, "nothing"))...), request(nbd.Request{Type: nbd.CmdWrite, Len: 8})...),
		"a request after info":         append(append([]byte{0, 0, 0, 3}, nbd.AppendOption(nil, nbd.OptInfo, nbd.AppendInfoRequest(nil, "v"))...), request(nbd.Request{Type: nbd.CmdWrite, Len: 8})...),
		"an option in half, then gone": append([]byte{0, 0, 0, 3}, option(nbd.OptGo, 100)[:10]...),
	} {
		nc := raw(t, "unix", s.sock)
		mustWrite(t, nc, b)
		if what == "an option in half, then gone" {
			must(t, nc.(*net.UnixConn).CloseWrite())
		}
		t.Run(what, func(t *testing.T) { gone(t, nc) })
	}
	for what, b := range map[string][]byte{
		"no request magic":      make([]byte, nbd.RequestSize),
		"an option":             append(option(nbd.OptGo, 12), make([]byte, 12)...),
		"a write of 4 GiB":      request(nbd.Request{Type: nbd.CmdWrite, Len: 1<<32 - 1}),
		"a write over the max.": request(nbd.Request{Type: nbd.CmdWrite, Len: nbd.MaxPayload + 1}),
		"a read of 4 GiB, then no magic": append(request(nbd.Request{Type: nbd.CmdRead, Len: 1<<32 - 1}),
			make([]byte, nbd.RequestSize)...),
	} {
		nc := rawTransmission(t, "unix", s.sock, "v")
		mustWrite(t, nc, b)
		t.Run(what, func(t *testing.T) { gone(t, nc) })
	}
	if grown := int64(heap()) - int64(before); grown > 16<<20 {
		t.Errorf("lengths that were only claimed have allocated %d bytes", grown)
	}
	if !bytes.Equal(m.at(0, 1<<20), make([]byte, 1<<20)) {
		t.Error("garbage has been written")
	}
}

// TestWritePayloadOfARefusedRequestIsSkipped: the connection stays in step.
func TestWritePayloadOfARefusedRequestIsSkipped(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}})
	nc := rawTransmission(t, "tcp", s.tcp, "v")
	var b []byte
	for i := range uint64(50) {
		n := uint32(1 + i*i*300)
		b = nbd.AppendRequest(b, nbd.Request{Type: nbd.CmdWrite, Off: 1 << 20, Len: n, Cookie: i})
		b = append(b, bytes.Repeat([]byte{0x25, 0x60, 0x95, 0x13}, int(n/4+1))[:n]...)
	}
	sent := make(chan error, 1)
	go func() { _, err := nc.Write(b); sent <- err }()
	for i := range uint64(50) {
		if errno, cookie := simple(t, nc); errno != 28 || cookie != i {
			t.Fatalf("request %d: error %d for %d", i, errno, cookie)
		}
	}
	must(t, <-sent)
}

// TestClientThatDoesNotRead fills its budget, hurts nobody, holds nobody's
// goroutine, and is let go.
func TestClientThatDoesNotRead(t *testing.T) {
	m := newMemory(8 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m, "other": newMemory(1 << 20)}, Unread: 300 * time.Millisecond})
	bystander(t, s.uri("other"))
	m.hold()
	nc := rawTransmission(t, "unix", s.sock, "v")
	var b []byte
	for i := range uint64(32) {
		b = nbd.AppendRequest(b, nbd.Request{Type: nbd.CmdRead, Len: 4 << 20, Cookie: i})
	}
	mustWrite(t, nc, b)
	waitFor(t, "the budget to fill", func() bool { return m.kept() == 64/4 })
	if requests, held := s.Held(); requests < 16 || requests > 17 || held < 64<<20 || held > 64<<20+16<<10 { // the bystander's included
		t.Errorf("%d requests hold %d bytes", requests, held)
	}
	m.letGo() // would hang here if replies were written by the volume's goroutine
	waitFor(t, "the connection to be closed", func() bool { return s.Conns("v") == 0 })
	gone(t, nc)
}

// TestAbortMidReply cuts connections while their replies are on the way.
func TestAbortMidReply(t *testing.T) {
	m := newMemory(8 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m, "other": newMemory(1 << 20)}})
	bystander(t, s.uri("other"))
	for i := range 16 {
		network, addr := "unix", s.sock
		if i%2 == 0 {
			network, addr = "tcp", s.tcp
		}
		nc := rawTransmission(t, network, addr, "v")
		var b []byte
		for range 20 {
			b = nbd.AppendRequest(b, nbd.Request{Type: nbd.CmdRead, Len: 1 << 20})
		}
		mustWrite(t, nc, b)
		mustRead(t, nc, make([]byte, 1+i*100000))
		if c, ok := nc.(*net.TCPConn); ok && i%4 == 0 {
			must(t, c.SetLinger(0)) // a reset rather than an end
		}
		must(t, nc.Close())
	}
	waitFor(t, "the connections to end", func() bool { return s.Conns("v") == 0 })
}

func TestIdleHandshakeIsCut(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}, Handshake: 50 * time.Millisecond})
	silent := raw(t, "unix", s.sock)
	chatty := greeted(t, raw(t, "tcp", s.tcp))
	gone(t, silent)
	gone(t, chatty)
	nc := rawTransmission(t, "unix", s.sock, "v") // the deadline ends with the handshake
	waitFor(t, "twice the deadline to pass", after(100*time.Millisecond))
	mustWrite(t, nc, nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdFlush}))
	simple(t, nc)
}

func after(d time.Duration) func() bool {
	end := time.Now().Add(d)
	return func() bool { return time.Now().After(end) }
}

// TestFullHouse: half-open connections make room, open ones do not.
func TestFullHouse(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}, MaxConns: 4})
	var half []net.Conn
	for range 4 {
		half = append(half, greeted(t, raw(t, "unix", s.sock)))
	}
	var open []net.Conn
	for i := range 4 {
		open = append(open, rawTransmission(t, "unix", s.sock, "v"))
		gone(t, half[i])
	}
	late := raw(t, "unix", s.sock)
	gone(t, late)
	for _, nc := range open {
		mustWrite(t, nc, nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdFlush}))
		simple(t, nc)
	}
}

// TestManyBadClients is a small flood: half-open connections and malformed
// requests, beside somebody who works.
func TestManyBadClients(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20), "other": newMemory(1 << 20)}, MaxConns: 300})
	bystander(t, s.uri("other"))
	before := heap()
	for range 600 {
		raw(t, "unix", s.sock)
	}
	nc := rawTransmission(t, "unix", s.sock, "v")
	const rounds, each = 200, 100
	var b []byte
	for i := range each {
		b = nbd.AppendRequest(b, nbd.Request{Type: uint16(i % 9), Flags: 1 << 14, Off: 1<<64 - 1, Len: 4})
		if uint16(i%9) == nbd.CmdWrite {
			b = append(b, "data"...)
		}
		if uint16(i%9) == nbd.CmdDisc {
			b = b[:len(b)-nbd.RequestSize]
		}
	}
	replies := (each - each/9 - 1) * nbd.SimpleSize
	for range rounds {
		mustWrite(t, nc, b)
		mustRead(t, nc, make([]byte, replies))
	}
	if n := s.All(); n > 300 {
		t.Errorf("%d connections are open", n)
	}
	if grown := int64(heap()) - int64(before); grown > 64<<20 {
		t.Errorf("the heap has grown by %d bytes", grown)
	}
}

// TestRandomBytes sends random damage of valid streams from a fixed seed.
func TestRandomBytes(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20), "other": newMemory(1 << 20)}, Unread: time.Second})
	bystander(t, s.uri("other"))
	r := rand.New(rand.NewPCG(11, 12))
	good := []byte{0, 0, 0, 3}
	good = nbd.AppendOption(good, nbd.OptStructured, nil)
	good = nbd.AppendOption(good, nbd.OptSetMeta, nbd.AppendMetaRequest(nil, "v", nbd.ContextAllocation))
	good = nbd.AppendOption(good, nbd.OptGo, nbd.AppendInfoRequest(nil, "v", 1, 2, 3))
	for i := range uint64(12) {
		good = nbd.AppendRequest(good, nbd.Request{Type: uint16(i % 8), Off: i * 512, Len: 512, Cookie: i})
		if i%8 == uint64(nbd.CmdWrite) {
			good = append(good, make([]byte, 512)...)
		}
	}
	for range 400 {
		b := bytes.Clone(good)
		for range 1 + r.IntN(4) {
			b[r.IntN(len(b))] ^= 1 << r.IntN(8)
		}
		nc := raw(t, "unix", s.sock)
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			if _, err := nc.Write(b[:r.IntN(len(b))+1]); err == nil {
				// Half closed: whatever the server makes of it, it comes to an end.
				if err := nc.(*net.UnixConn).CloseWrite(); err != nil && !isReset(err) {
					t.Error(err)
				}
			}
		}()
		<-sent
		gone(t, nc)
	}
}

// TestReconnectsUnderLoad opens and cuts connections at random moments while
// each has requests in flight on a volume that answers from other goroutines.
func TestReconnectsUnderLoad(t *testing.T) {
	m := newMemory(4 << 20)
	v := &slow{memory: m}
	s := serve(t, server.Config{Exports: exports{"v": v}})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 16 {
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				c, err := client.Dial(ctx, s.uri("v"), nil)
				cancel()
				if err != nil {
					t.Error(err)
					return
				}
				var in sync.WaitGroup
				for k := range 64 {
					in.Add(1)
					c.Start(&client.Req{Type: uint16(k % 2), Off: uint64(g) << 20, Data: make([]byte, 8<<10), Done: func(r *client.Req) { in.Done() }})
					if k == 10+i {
						go func() {
							if err := c.Close(); err != nil {
								t.Error(err)
							}
						}()
					}
				}
				in.Wait()
			}
		})
	}
	wg.Wait()
	waitFor(t, "all connections to end", func() bool { return s.All() == 0 })
	v.wg.Wait()
}

// slow answers from goroutines of its own.
type slow struct {
	*memory
	wg sync.WaitGroup
}

func (v *slow) Submit(ops []*volume.Op) {
	own := append([]*volume.Op(nil), ops...)
	v.wg.Go(func() { v.memory.Submit(own) })
}
