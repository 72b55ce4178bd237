package client_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/client"
	"github.com/cairnstore/cairn/chunk/server"
	"github.com/cairnstore/cairn/netplane/link"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// sinkStore copies each write, as a store does, and answers at once. It reads
// from a cache, so to speak.
type sinkStore struct {
	id   ids.StoreID
	disk []byte
}

func (s *sinkStore) ID() ids.StoreID { return s.id }

func (s *sinkStore) Submit(reqs []*wire.Request, sink wire.Sink) {
	rs := make([]*wire.Reply, len(reqs))
	own := make([]wire.Reply, len(reqs))
	for i, q := range reqs {
		copy(s.disk[int(q.Block)*ids.BlockSize%len(s.disk):], q.Data)
		own[i] = wire.Reply{Kind: q.Kind, ID: q.ID}
		if q.Kind == wire.Read {
			own[i].Data = s.disk[:int(q.Count)*ids.BlockSize]
		}
		rs[i] = &own[i]
	}
	sink.Replies(rs)
}

// serverEnv turns the test binary into a chunk server, so that both sides are
// processes of their own, as in a cluster.
const serverEnv = "CAIRN_TEST_SERVER"

func TestMain(m *testing.M) {
	if os.Getenv(serverEnv) != "" {
		serveProcess()
		return
	}
	os.Exit(m.Run())
}

// processStore is the store of such a process.
var processStore = ids.StoreID{1, 2, 3}

// serveProcess prints its address and serves until its input ends.
func serveProcess() {
	l, err := link.Listen(link.Config{Addr: "127.0.0.1:0"})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	s := server.New(server.Config{Cluster: cluster, Stores: []server.Store{&sinkStore{processStore, make([]byte, 64<<20)}}})
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	fmt.Println(l.Addr())
	_, err = io.Copy(io.Discard, os.Stdin)
	if err = errors.Join(err, s.Close(), <-ended); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// pump is a writer with depth operations in flight, each complete when every
// replica has answered. It runs inside Replies, as the engine does.
type pump struct {
	links   []client.Link
	up      chan int
	done    chan struct{}
	kind    wire.Kind
	blocks  uint32 // of each request
	data    []byte
	sums    []uint32
	lock    chan struct{} // a mutex the race detector and profiles can see
	left    int           // operations not started
	open    int           // not complete
	missing []int         // by slot: replicas that have not answered
	sends   [][]*wire.Request
}

type pumpEnd struct {
	p *pump
	i int
}

func (e *pumpEnd) Up(uint64)           { e.p.up <- e.i }
func (e *pumpEnd) Down(uint64, string) {}
func (e *pumpEnd) Lost(why string)     { panic(why) }

func (e *pumpEnd) Replies(_ uint64, rs []*wire.Reply) {
	p := e.p
	p.lock <- struct{}{}
	for _, r := range rs {
		slot := int(r.ID)
		if p.missing[slot]--; p.missing[slot] > 0 {
			continue
		}
		p.open--
		p.start(slot)
	}
	sends := p.sends
	p.sends = make([][]*wire.Request, len(p.links))
	over := p.open == 0
	<-p.lock
	for i, qs := range sends {
		if len(qs) > 0 {
			p.links[i].Send(1, qs)
		}
	}
	if over {
		select {
		case p.done <- struct{}{}:
		default:
		}
	}
}

// start begins an operation in a slot, if any are left. The lock is held.
func (p *pump) start(slot int) {
	if p.left == 0 {
		return
	}
	p.left--
	p.open++
	p.missing[slot] = len(p.links)
	for i := range p.links {
		q := &wire.Request{Kind: p.kind, ID: uint64(slot), Store: processStore, Volume: 1, Chunk: 1, Epoch: 1,
			Block: ids.Block(slot * 37 % 1000), Count: p.blocks, Version: 1}
		if p.kind == wire.Write {
			q.Sums, q.Data = p.sums, p.data
		}
		p.sends[i] = append(p.sends[i], q)
	}
}

func cpu(b *testing.B, who int) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(who, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkLink writes to all replicas, each a process, or reads from one, at a
// depth, and reports the CPU time of all processes per operation and per
// request to a replica:
//
//	go test -run xxx -bench Link -benchtime 50000x ./chunk/client
func BenchmarkLink(b *testing.B) {
	for _, c := range []struct {
		kind            wire.Kind
		blocks          uint32
		replicas, depth int
	}{{wire.Write, 1, 1, 1}, {wire.Write, 1, 1, 32}, {wire.Write, 1, 3, 1}, {wire.Write, 1, 3, 32}, {wire.Write, 64, 3, 8}, {wire.Read, 1, 1, 32}, {wire.Read, 64, 1, 8}} {
		b.Run(fmt.Sprintf("%v/blocks=%d/replicas=%d/depth=%d", c.kind, c.blocks, c.replicas, c.depth), func(b *testing.B) {
			bench(b, c.replicas, c.depth, &pump{kind: c.kind, blocks: c.blocks})
		})
	}
}

func bench(b *testing.B, replicas, depth int, p *pump) {
	p.up, p.done, p.lock = make(chan int, replicas), make(chan struct{}, 1), make(chan struct{}, 1)
	p.data, p.sums = make([]byte, p.blocks*ids.BlockSize), make([]uint32, p.blocks)
	p.missing, p.sends, p.left = make([]int, depth), make([][]*wire.Request, replicas), b.N
	b.SetBytes(int64(len(p.data)))
	var cmds []*exec.Cmd
	childBefore := cpu(b, syscall.RUSAGE_CHILDREN)
	for i := range replicas {
		cmd, addr := startProcess(b)
		cmds = append(cmds, cmd)
		p.links = append(p.links, client.Dial(client.Config{Addr: addr, Cluster: cluster}, &pumpEnd{p, i}))
	}
	for range replicas {
		<-p.up
	}
	before := cpu(b, syscall.RUSAGE_SELF)
	b.ResetTimer()
	p.lock <- struct{}{}
	for slot := range depth {
		p.start(slot)
	}
	sends := p.sends
	p.sends = make([][]*wire.Request, replicas)
	<-p.lock
	for i, qs := range sends {
		p.links[i].Send(1, qs)
	}
	<-p.done
	b.StopTimer()
	used := cpu(b, syscall.RUSAGE_SELF) - before
	for _, l := range p.links {
		l.Close()
	}
	for _, cmd := range cmds {
		kill(b, cmd, syscall.SIGKILL)
	}
	used += cpu(b, syscall.RUSAGE_CHILDREN) - childBefore
	us := float64(used.Nanoseconds()) / 1000 / float64(b.N)
	b.ReportMetric(us, "cpu-µs/op")
	b.ReportMetric(us/float64(replicas), "cpu-µs/request")
}
