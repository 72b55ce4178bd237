package server_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/nbd/server"
)

// cpu is the time this process has spent on processors.
func cpu(b *testing.B) time.Duration {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

// BenchmarkBothEnds runs our client against our server in one process: the
// figure cpu-µs/op is that of both ends together.
func BenchmarkBothEnds(b *testing.B) {
	for _, cmd := range []uint16{nbd.CmdRead, nbd.CmdWrite} {
		for _, depth := range []int{1, 32} {
			b.Run(fmt.Sprintf("%s-4k-depth%d", map[uint16]string{nbd.CmdRead: "read", nbd.CmdWrite: "write"}[cmd], depth), func(b *testing.B) {
				s := serve(b, server.Config{Exports: exports{"v": newMemory(64 << 20)}})
				c := dial(b, s.uri("v"), nil)
				b.ReportAllocs()
				b.ResetTimer()
				before := cpu(b)
				pump(b, c, cmd, depth, 4096)
				b.ReportMetric(float64((cpu(b)-before).Nanoseconds())/1000/float64(b.N), "cpu-µs/op")
			})
		}
	}
}

// pump keeps depth requests in flight until b.N are done.
func pump(b *testing.B, c *client.Client, cmd uint16, depth, size int) {
	var wg sync.WaitGroup
	wg.Add(b.N)
	started := make(chan struct{}, 1)
	started <- struct{}{}
	left := b.N
	blocks := c.Size() / uint64(size)
	next := func(r *client.Req) {
		<-started
		more := left > 0
		if more {
			left--
		}
		n := left
		started <- struct{}{}
		if more {
			r.Off = uint64(n) * 7919 % blocks * uint64(size)
			c.Start(r)
		}
	}
	for range depth {
		r := &client.Req{Type: cmd, Data: make([]byte, size)}
		r.Done = func(r *client.Req) {
			if r.Err != nil {
				b.Error(r.Err)
			}
			next(r)
			wg.Done()
		}
		next(r)
	}
	wg.Wait()
}

// TestNoAllocationPerRequest: what a batch needs is there from the one before.
func TestNoAllocationPerRequest(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}})
	for _, structured := range []bool{false, true} {
		nc := greeted(t, raw(t, "unix", s.sock))
		if structured {
			wantReply(t, nc, nbd.OptStructured, nil, nbd.RepAck)
		}
		wantReply(t, nc, nbd.OptGo, nbd.AppendInfoRequest(nil, "v"), nbd.RepAck)
		const depth = 16
		var batch []byte
		for i := range uint64(depth) {
			batch = append(batch, write4k(i, i)...)
			batch = nbd.AppendRequest(batch, nbd.Request{Type: nbd.CmdRead, Off: i * 4096, Len: 4096})
			batch = nbd.AppendRequest(batch, nbd.Request{Type: nbd.CmdWriteZeroes, Off: i * 4096, Len: 4096})
			batch = nbd.AppendRequest(batch, nbd.Request{Type: nbd.CmdFlush})
		}
		head := nbd.SimpleSize
		if structured {
			head = nbd.DataHeadSize
		}
		replies := make([]byte, depth*(3*nbd.SimpleSize+head+4096))
		per := testing.AllocsPerRun(300, func() {
			mustWrite(t, nc, batch)
			mustRead(t, nc, replies)
		})
		if !raceDetector && per >= depth/4 { // a collection empties the pools now and then
			t.Errorf("structured %v: %v allocations per batch of %d requests", structured, per, 4*depth)
		}
	}
}

// BenchmarkServer drives the server with a client that does next to nothing:
// depth requests in one write, their replies read as one lump. The client's
// part of cpu-µs/op is one write, the copies, and the reads.
func BenchmarkServer(b *testing.B) {
	for _, cmd := range []uint16{nbd.CmdRead, nbd.CmdWrite} {
		for _, depth := range []int{1, 32} {
			b.Run(fmt.Sprintf("%s-4k-depth%d", map[uint16]string{nbd.CmdRead: "read", nbd.CmdWrite: "write"}[cmd], depth), func(b *testing.B) {
				s := serve(b, server.Config{Exports: exports{"v": newMemory(64 << 20)}})
				nc := rawTransmission(b, "unix", s.sock, "v")
				var batch []byte
				for i := range depth {
					batch = nbd.AppendRequest(batch, nbd.Request{Type: cmd, Off: uint64(i) * 8192, Len: 4096})
					if cmd == nbd.CmdWrite {
						batch = append(batch, make([]byte, 4096)...)
					}
				}
				replies := make([]byte, depth*nbd.SimpleSize)
				if cmd == nbd.CmdRead {
					replies = make([]byte, depth*(nbd.SimpleSize+4096))
				}
				b.ReportAllocs()
				b.ResetTimer()
				before := cpu(b)
				for range (b.N + depth - 1) / depth {
					mustWrite(b, nc, batch)
					mustRead(b, nc, replies)
				}
				b.ReportMetric(float64((cpu(b)-before).Nanoseconds())/1000/float64(b.N), "cpu-µs/op")
			})
		}
	}
}
