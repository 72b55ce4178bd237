package client_test

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/client"
	"github.com/cairnstore/cairn/netplane/link"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// fastPing lets a silent peer be noticed in a quarter of the usual time.
const fastPing = 75 * time.Millisecond

// dialCalm makes a link that no slowness of this machine ends.
func dialCalm(t testing.TB, addr string, h client.Handler) client.Link {
	t.Helper()
	l := client.Dial(client.Config{Addr: addr, Cluster: cluster, Ping: patience, Attempt: patience}, h)
	t.Cleanup(l.Close)
	return l
}

func dialFast(t testing.TB, addr string, h client.Handler) client.Link {
	t.Helper()
	l := client.Dial(client.Config{Addr: addr, Cluster: cluster, Ping: fastPing, Attempt: 10 * fastPing}, h)
	t.Cleanup(l.Close)
	return l
}

// startProcess starts this binary as a chunk server of its own process.
func startProcess(t testing.TB) (*exec.Cmd, string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), serverEnv+"=1")
	cmd.Stderr = os.Stderr
	if _, err := cmd.StdinPipe(); err != nil { // the server ends when this process does
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			kill(t, cmd, syscall.SIGKILL)
		}
	})
	addr, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return cmd, strings.TrimSpace(addr)
}

// kill ends the process by a signal and waits for its end.
func kill(t testing.TB, cmd *exec.Cmd, sig syscall.Signal) {
	t.Helper()
	if err := cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Errorf("the chunk server ended by itself before %v", sig)
	}
}

// Kill -9 with requests in flight: down, then lost at once because nobody
// listens, and not because time ran out; and up again when the server is back at
// its address.
func TestKilledServerIsReportedAndFoundAgain(t *testing.T) {
	noLeak(t)
	cmd, addr := startProcess(t)
	p := newProbe()
	l := dialCalm(t, addr, p)
	p.want(t, "up 1")
	write(t, l, p, 1, processStore, 1, 100)
	kill(t, cmd, syscall.SIGKILL)
	l.Send(1, []*wire.Request{{Kind: wire.Write, ID: 1, Store: processStore, Count: 1, Sums: []uint32{1}, Data: block(1)}})
	p.want(t, "down 1: ")
	if why := p.want(t, "lost: "); !strings.Contains(why, "refused") && !strings.Contains(why, "reset") && !strings.Contains(why, "EOF") {
		t.Fatalf("%q does not say that the connection was refused", why) // a dying process may still accept one
	}
	l.Send(1, []*wire.Request{{Kind: wire.Flush, ID: 2}}) // into the void
	st := newMemStore(false)
	startNode(t, addr, st)
	p.want(t, "up 2")
	write(t, l, p, 2, st.id, 1, 10)
}

// A stopped process keeps its connections open, and its kernel accepts more.
func TestStoppedServerIsSilent(t *testing.T) {
	noLeak(t)
	cmd, addr := startProcess(t)
	p := newProbe()
	l := dialFast(t, addr, p)
	p.want(t, "up 1")
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if why := p.want(t, "down 1: "); !strings.Contains(why, "no byte") {
		t.Fatalf("%q does not say that the peer was silent", why)
	}
	if why := p.want(t, "lost: "); !strings.Contains(why, "greeting") {
		t.Fatalf("%q does not say that the greeting was not answered", why)
	}
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	p.want(t, "up 2")
	write(t, l, p, 2, processStore, 1, 10)
}

// peer is a server that the test plays by hand.
type peer struct {
	t  *testing.T
	nc net.Conn
}

// listenByHand returns an address and the connections made to it.
func listenByHand(t *testing.T) (string, <-chan *peer) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan *peer, 100)
	ended := make(chan struct{})
	var all []net.Conn
	go func() {
		defer close(ended)
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			all = append(all, nc)
			accepted <- &peer{t, nc}
		}
	}()
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		<-ended
		for _, nc := range all {
			nc.Close() // the test may have closed it
		}
	})
	return l.Addr().String(), accepted
}

func next(t *testing.T, peers <-chan *peer) *peer {
	t.Helper()
	select {
	case p := <-peers:
		if err := p.nc.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		return p
	case <-time.After(patience):
		t.Fatal("nobody connected")
	}
	return nil
}

// read returns the next request of the client.
func (p *peer) read() *wire.Request {
	p.t.Helper()
	head := make([]byte, wire.HeaderBytes)
	if _, err := io.ReadFull(p.nc, head); err != nil {
		p.t.Fatal(err)
	}
	h, err := wire.ParseHeader(head)
	if err != nil {
		p.t.Fatal(err)
	}
	rest := make([]byte, h.BodyLen+h.DataLen)
	if _, err := io.ReadFull(p.nc, rest); err != nil {
		p.t.Fatal(err)
	}
	q, err := wire.DecodeRequest(h, rest[:h.BodyLen])
	if err != nil {
		p.t.Fatal(err)
	}
	q.Data = rest[h.BodyLen:]
	return q
}

func (p *peer) write(b []byte) {
	p.t.Helper()
	if _, err := p.nc.Write(b); err != nil {
		p.t.Fatal(err)
	}
}

// greet takes the Hello and grants a window.
func (p *peer) greet(window uint64) {
	p.t.Helper()
	q := p.read()
	if q.Kind != wire.Hello || string(q.Data) != cluster || q.Version != wire.Version {
		p.t.Fatalf("greeted by %+v", q)
	}
	p.write(wire.AppendReply(nil, &wire.Reply{Kind: wire.Hello, ID: q.ID, Count64: window}))
}

func TestPeerThatAcceptsAndSaysNothing(t *testing.T) {
	noLeak(t)
	addr, peers := listenByHand(t)
	p := newProbe()
	dialFast(t, addr, p)
	next(t, peers)
	p.want(t, "lost: ")
	next(t, peers).greet(0) // it goes on trying
	p.want(t, "up 1")
}

// One attempt that fails is told once, however many follow.
func TestLostIsToldOnce(t *testing.T) {
	noLeak(t)
	addr, peers := listenByHand(t)
	p := newProbe()
	dialCalm(t, addr, p)
	for range 5 {
		if err := next(t, peers).nc.Close(); err != nil {
			t.Fatal(err)
		}
	}
	next(t, peers).greet(0)
	p.want(t, "lost: ")
	p.want(t, "up 1")
}

// What the client does when the server breaks the protocol after its greeting.
func TestGarbageFromTheServer(t *testing.T) {
	noLeak(t)
	good := wire.AppendReply(nil, &wire.Reply{Kind: wire.Write, ID: 1})
	flipped := bytes.Clone(good)
	flipped[40] ^= 1
	for name, c := range map[string]struct {
		bytes []byte
		why   string
	}{
		"noise":        {bytes.Repeat([]byte("garbage!"), 100), "not a cairn frame"},
		"flipped bit":  {flipped, "damaged"},
		"a request":    {wire.AppendRequest(nil, &wire.Request{Kind: wire.Flush}), "not a reply"},
		"nobody asked": {wire.AppendReply(nil, &wire.Reply{Kind: wire.Write, ID: 2}), "nobody asked"},
		"twice":        {append(bytes.Clone(good), good...), "nobody asked"},
		"half a block": {append(wire.AppendReply(nil, &wire.Reply{Kind: wire.Read, ID: 1, Data: make([]byte, 100)}), make([]byte, 100)...), "broken block"},
	} {
		t.Run(name, func(t *testing.T) {
			addr, peers := listenByHand(t)
			p := newProbe()
			l := dialCalm(t, addr, p)
			by := next(t, peers)
			by.greet(0)
			p.want(t, "up 1")
			p.expect(1, func(*wire.Reply) {})
			l.Send(1, []*wire.Request{{Kind: wire.Write, ID: 1, Count: 1, Sums: []uint32{1}, Data: block(1)}})
			by.write(c.bytes)
			if why := p.want(t, "down 1: "); !strings.Contains(why, c.why) {
				t.Fatalf("%q does not say %q", why, c.why)
			}
			by = next(t, peers)
			by.greet(0)
			p.want(t, "up 2")
			l.Send(1, []*wire.Request{{Kind: wire.Drop, ID: 3}}) // meant for the connection that is gone
			l.Send(2, []*wire.Request{{Kind: wire.Flush, ID: 4}})
			q := by.read()
			for q.Kind == wire.Ping {
				q = by.read()
			}
			if q.Kind != wire.Flush || q.ID != 4 {
				t.Fatalf("a %v came, want only the flush of this connection", q.Kind)
			}
			l.Close()
		})
	}
}

// A reply cut at every byte gives an end of the connection, never a reply.
func TestReplyCutAnywhere(t *testing.T) {
	noLeak(t)
	addr, peers := listenByHand(t)
	frame := append(wire.AppendReply(nil, &wire.Reply{Kind: wire.Read, ID: 1, Data: block(3)}), block(3)...)
	for cut := 0; cut < len(frame); cut += 1 + cut/40 {
		p := newProbe()
		l := dialCalm(t, addr, p)
		by := next(t, peers)
		by.greet(0)
		p.want(t, "up 1")
		l.Send(1, []*wire.Request{{Kind: wire.Read, ID: 1, Count: 1}})
		if q := by.read(); q.Kind != wire.Read {
			t.Fatalf("got a %v", q.Kind)
		}
		by.write(frame[:cut])
		if err := by.nc.Close(); err != nil {
			t.Fatal(err)
		}
		p.want(t, "down 1: ")
		next(t, peers) // it dials again
		l.Close()
	}
}

// While a request goes unanswered for many pings and the window is full, pings
// still come, and their answers keep the connection.
func TestPingsPassAFullWindow(t *testing.T) {
	noLeak(t)
	addr, peers := listenByHand(t)
	p := newProbe()
	l := dialFast(t, addr, p)
	by := next(t, peers)
	by.greet(10_000) // two writes
	p.want(t, "up 1")
	var wg sync.WaitGroup
	var reqs []*wire.Request
	for i := range uint64(5) {
		wg.Add(1)
		p.expect(i, func(*wire.Reply) { wg.Done() })
		q := &wire.Request{Kind: wire.Write, ID: i, Count: 1, Sums: []uint32{1}, Data: block(i)}
		if i == 4 { // small enough for what is left of the window; it waits its turn all the same
			q = &wire.Request{Kind: wire.Flush, ID: i}
		}
		reqs = append(reqs, q)
	}
	l.Send(1, reqs)
	for _, q := range reqs {
		clear(q.Data) // all was copied
	}
	var got []uint64
	take := func(q *wire.Request) {
		if q.Kind == wire.Write && !bytes.Equal(q.Data, block(q.ID)) {
			t.Fatalf("write %d came with other data", q.ID)
		}
		if q.Kind != wire.Ping {
			got = append(got, q.ID)
			return
		}
		by.write(wire.AppendReply(nil, &wire.Reply{Kind: wire.Ping, ID: q.ID}))
	}
	for range 14 { // 2 writes and 12 pings
		take(by.read())
	}
	if len(got) != 2 {
		t.Fatalf("%d requests came through a window for 2", len(got))
	}
	for i := range uint64(5) {
		by.write(wire.AppendReply(nil, &wire.Reply{Kind: reqs[i].Kind, ID: i}))
		for len(got) < min(int(i)+3, 5) {
			take(by.read())
		}
	}
	wait(t, &wg)
	for i, id := range got {
		if uint64(i) != id {
			t.Fatalf("order %v", got)
		}
	}
}

// A handler that takes its time is not a silent peer: bytes may be waiting that
// nobody reads.
func TestSlowHandlerIsNotASilentPeer(t *testing.T) {
	noLeak(t)
	addr, peers := listenByHand(t)
	p := newProbe()
	l := dialFast(t, addr, p)
	by := next(t, peers)
	by.greet(0)
	p.want(t, "up 1")
	entered, leave := make(chan struct{}), make(chan struct{})
	p.expect(1, func(*wire.Reply) {
		close(entered)
		<-leave
	})
	l.Send(1, []*wire.Request{{Kind: wire.Flush, ID: 1}})
	by.write(wire.AppendReply(nil, &wire.Reply{Kind: wire.Flush, ID: 1}))
	<-entered
	for pings := 0; pings < 12; {
		if by.read().Kind == wire.Ping {
			pings++
		}
	}
	var wg sync.WaitGroup
	wg.Add(1)
	p.expect(2, func(*wire.Reply) { wg.Done() })
	l.Send(1, []*wire.Request{{Kind: wire.Flush, ID: 2}})
	by.write(wire.AppendReply(nil, &wire.Reply{Kind: wire.Flush, ID: 2}))
	close(leave)
	wait(t, &wg)
	if len(p.events) > 0 {
		t.Fatalf("unexpected: %s", <-p.events)
	}
}

// A peer that reads nothing must not keep Close, nor Send, waiting; and what
// waits in the link is bounded.
func TestCloseWhileTheSocketIsFull(t *testing.T) {
	noLeak(t)
	addr, peers := listenByHand(t)
	p := newProbe()
	l := client.Dial(client.Config{Addr: addr, Cluster: cluster, Ping: patience, Attempt: patience}, p)
	next(t, peers).greet(0)
	p.want(t, "up 1")
	data := make([]byte, 1<<20)
	for i := range uint64(64) {
		l.Send(1, []*wire.Request{{Kind: wire.Write, ID: i, Count: 256, Sums: make([]uint32, 256), Data: data}})
	}
	l.Close()
	l.Close()
	l.Send(1, []*wire.Request{{Kind: wire.Flush, ID: 99}})
	if len(p.events) > 0 {
		t.Fatalf("unexpected: %s", <-p.events)
	}
}

func TestWhatWaitsIsBounded(t *testing.T) {
	noLeak(t)
	addr, peers := listenByHand(t)
	p := newProbe()
	l := client.Dial(client.Config{Addr: addr, Cluster: cluster, Ping: patience, Attempt: patience, HoldBytes: 32 << 20}, p)
	t.Cleanup(l.Close)
	next(t, peers).greet(0)
	p.want(t, "up 1")
	data := make([]byte, 1<<20)
	for i := range uint64(64) {
		l.Send(1, []*wire.Request{{Kind: wire.Write, ID: i, Count: 256, Sums: make([]uint32, 256), Data: data}})
	}
	if why := p.want(t, "down 1: "); !strings.Contains(why, "over the limit") {
		t.Fatalf("%q does not name the limit", why)
	}
}

// Close at any moment: while dialling, greeting, up, and from many goroutines.
func TestCloseAtAnyMoment(t *testing.T) {
	noLeak(t)
	st := newMemStore(true)
	t.Cleanup(st.wg.Wait) // after the node is closed: until then a late request may come
	n := startNode(t, "127.0.0.1:0", st)
	for i := range 300 {
		p := newProbe()
		l := client.Dial(client.Config{Addr: n.addr, Cluster: cluster}, p)
		if i%3 > 0 {
			p.want(t, "up 1")
		}
		if i%3 > 1 {
			p.expect(1, func(*wire.Reply) {})
			l.Send(1, []*wire.Request{{Kind: wire.Read, ID: 1, Store: st.id, Count: 100}})
		}
		var wg sync.WaitGroup
		for range 3 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				l.Close()
			}()
		}
		wg.Wait()
		for len(p.events) > 0 {
			if e := <-p.events; !strings.HasPrefix(e, "up") {
				t.Fatalf("unexpected: %s", e)
			}
		}
	}
}

func TestRefusals(t *testing.T) {
	noLeak(t)
	n := startNode(t, "127.0.0.1:0", newMemStore(false))
	p := newProbe()
	l := client.Dial(client.Config{Addr: n.addr, Cluster: "another"}, p)
	t.Cleanup(l.Close)
	if why := p.want(t, "lost: "); !strings.Contains(why, `belongs to cluster "test cluster", not to "another"`) {
		t.Fatalf("%q does not name the clusters", why)
	}
	q := newProbe()
	m := dial(t, n.addr, q)
	q.want(t, "up 1")
	got := make(chan *wire.Reply, 1)
	q.expect(7, func(r *wire.Reply) { got <- r })
	m.Send(1, []*wire.Request{{Kind: wire.Flush, ID: 7, Store: ids.NewStoreID()}})
	if r := <-got; r.Status != status.NotFound || !strings.Contains(r.Detail, "has no store") {
		t.Fatalf("got %+v", r)
	}
}

// The server's kernel vanishes from the network: nothing is acknowledged, no
// packet says so. It runs in a network namespace of its own.
func TestBlackHole(t *testing.T) {
	const env = "CAIRN_TEST_BLACK_HOLE"
	if os.Getenv(env) == "" {
		if os.Geteuid() != 0 {
			t.Skip("needs root for a network namespace")
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestBlackHole$", "-test.v")
		cmd.Env = append(os.Environ(), env+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	noLeak(t)
	run(t, "ip", "link", "set", "lo", "up")
	st := newMemStore(false)
	n := startNode(t, "127.0.0.1:0", st)
	_, port, err := net.SplitHostPort(n.addr)
	if err != nil {
		t.Fatal(err)
	}
	p := newProbe()
	l := client.Dial(client.Config{Addr: n.addr, Cluster: cluster, Dialer: link.Dialer{}, Attempt: 10 * fastPing, Ping: fastPing}, p)
	t.Cleanup(l.Close)
	p.want(t, "up 1")
	run(t, "nft", "add table inet hole; add chain inet hole in { type filter hook input priority 0; }; add rule inet hole in tcp dport "+port+" drop")
	p.expect(1, func(*wire.Reply) { t.Error("an answer from the void") })
	l.Send(1, []*wire.Request{{Kind: wire.Read, ID: 1, Store: st.id, Count: 1}})
	p.want(t, "down 1: ")
	p.want(t, "lost: ")
	run(t, "nft", "delete table inet hole")
	p.want(t, "up 2")
	write(t, l, p, 2, st.id, 1, 10)
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}
