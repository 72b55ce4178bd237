package link

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

func listenOn(t *testing.T, c Config) *listener {
	t.Helper()
	l, err := Listen(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l.(*listener)
}

func (m *listener) all() string {
	var out []string
	for _, l := range m.tcp {
		out = append(out, l.Addr().String())
	}
	return strings.Join(out, ",")
}

// await looks again until ok, or fails with what was to come.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	end := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("%s did not happen", what)
		}
	}
}

func TestListenOnSeveralAddresses(t *testing.T) {
	l := listenOn(t, Config{Addr: "127.0.0.1:0, 127.0.0.2:0", DSCP: 26})
	for _, a := range SplitAddrs(l.all()) {
		c, err := Dialer{DSCP: 26}.Dial(context.Background(), a)
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got := s.LocalAddr().String(); got != a {
			t.Errorf("dialed %s, accepted at %s", a, got)
		}
		raw, err := s.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := control(raw, func(fd int) error {
			tos, err := unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TOS)
			if tos>>2 != 26 {
				t.Errorf("class of service %d, want 26", tos>>2)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(c.Close(), s.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accepting after the end: %v", err)
	}
}

func TestCheckAddrs(t *testing.T) {
	for list, ok := range map[string]bool{
		"10.0.0.1:1": true, "10.0.0.1:1, [fd00::1]:1": true, "host:7000": true, "": false, "10.0.0.1": false, ":7000": false,
		"10.0.0.1:": false, "a:1,a:1": false, "a:1,": false, strings.Repeat("a:1,", 0) + "a:1,b:1,c:1,d:1,e:1,f:1,g:1,h:1,i:1": false,
	} {
		if err := CheckAddrs(list); (err == nil) != ok || err != nil && !errors.Is(err, status.Invalid) {
			t.Errorf("%q: %v", list, err)
		}
	}
}

// A dead first address costs a moment, not the dial.
func TestDialTakesWhatAnswers(t *testing.T) {
	dead := listenOn(t, Config{Addr: "127.0.0.1:0"})
	gone := dead.all()
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	l := listenOn(t, Config{Addr: "127.0.0.1:0"})
	c, err := Dialer{}.Dial(context.Background(), gone+","+l.all())
	if err != nil {
		t.Fatal(err)
	}
	if c.RemoteAddr().String() != l.all() {
		t.Errorf("connected to %v", c.RemoteAddr())
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// Probes find out whether a path works, how fast, and with which packets; and
// notice its death and its return.
func TestProbes(t *testing.T) {
	l := listenOn(t, Config{Addr: "127.0.0.1:0,127.0.0.2:0", Echo: true})
	p := NewPaths(PathsConfig{Locals: []netip.Addr{netip.MustParseAddr("127.0.0.3"), netip.MustParseAddr("127.0.0.4")},
		Names: []string{"stable", "spine-1"}, Every: 5 * time.Millisecond})
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	addrs := l.all()
	p.Watch(addrs)
	await(t, "all paths are known", func() bool {
		st := p.States()
		return len(st) == 2 && !slices.ContainsFunc(st, func(s PathState) bool { return !s.Alive || s.RTT == 0 || s.Packet != 9000 })
	})
	st := p.States()
	if st[0].Name != "stable" || st[1].Name != "spine-1" || st[1].Local != "127.0.0.4" || st[0].Peer != addrs {
		t.Errorf("states %+v", st)
	}
	c, err := Dialer{Paths: p}.Dial(context.Background(), addrs)
	if err != nil {
		t.Fatal(err)
	}
	if at := c.LocalAddr().(*net.TCPAddr).IP.String(); at != "127.0.0.4" {
		t.Errorf("the plane's connection leaves from %s", at)
	}
	if n := p.States()[1].Conns; n != 1 {
		t.Errorf("%d connections over the plane", n)
	}
	if err := errors.Join(c.Close(), c.Close()); err == nil {
		t.Error("the second close does not say so")
	}
	if n := p.States()[1].Conns; n != 0 {
		t.Errorf("%d connections over the plane after the end", n)
	}
	again := l.echo[1].conn.LocalAddr().(*net.UDPAddr).AddrPort()
	if err := l.echo[1].conn.Close(); err != nil {
		t.Fatal(err)
	}
	await(t, "the plane is dead", func() bool { return !p.States()[1].Alive })
	if way := p.order(addrs, 0)[0]; way.path.name != "stable" {
		t.Errorf("the dead path comes first: %+v", way)
	}
	e, err := newEcho(again)
	if err != nil {
		t.Fatal(err)
	}
	l.echo[1] = e
	l.wg.Go(e.serve)
	await(t, "the plane is back", func() bool { return p.States()[1].Alive })
}

// Links that prefer differently use different planes; a slow plane is used by
// nobody who has a fast one; the stable address comes after the planes.
func TestOrder(t *testing.T) {
	p := NewPaths(PathsConfig{Every: time.Hour})
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	if p.Watch("10.0.0.1:1"); len(p.peers) != 0 || p.order("10.0.0.1:1", 0)[0].addr != "10.0.0.1:1" {
		t.Error("a peer with one address is probed")
	}
	const addrs = "10.0.0.1:1,10.1.0.1:1,10.2.0.1:1,10.3.0.1:1"
	p.Watch(addrs)
	ways := p.peers[addrs].paths
	set := func(rtts ...time.Duration) {
		p.mu.Lock()
		defer p.mu.Unlock()
		for i, d := range rtts {
			ways[i].known, ways[i].rtt = true, d*time.Microsecond
			ways[i].dead.Store(d == 0)
		}
	}
	got := func(prefer uint64) string {
		var b strings.Builder
		for _, c := range p.order(addrs, prefer) {
			b.WriteByte(c.addr[3])
		}
		return b.String()
	}
	check := func(want ...string) {
		t.Helper()
		for i, w := range want {
			if g := got(uint64(i)); g != w {
				t.Errorf("prefer %d: %s, want %s", i, g, w)
			}
		}
	}
	set(90, 100, 110, 120)
	check("3120", "1230", "2310", "3120")
	set(90, 100, 9000, 120)
	check("3120", "1320")
	set(90, 100, 0, 120)
	check("3102")
	ways[1].failed() // a connection over it stood still: others first for a while
	check("3012")
	ways[1].hurt.Store(false)
	set(90, 0, 0, 0)
	check("0312")
}

// twoPaths is a peer where nobody answers.
const twoPaths = "127.0.0.1:9,127.0.0.2:9"

// What the probes know of packet sizes becomes the connection's segment size,
// and a size that stops passing is given up for the next one.
func TestPacketSizes(t *testing.T) {
	p := NewPaths(PathsConfig{Every: time.Hour})
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	p.Watch(twoPaths)
	w := p.peers[twoPaths].paths[0]
	answer := func(n int) {
		b := make([]byte, n)
		copy(b, probeMagic[:])
		b[15] = byte(w.id)
		b[23] = byte(w.sent)
		p.answered(b)
	}
	round := func() {
		p.mu.Lock()
		p.probe(w)
		p.mu.Unlock()
		answer(probeBytes)
	}
	round()
	for _, size := range []int{1280, 1400, 1500, 9000} {
		answer(size - 28)
	}
	if w.size != 9000 || w.mss() != 0 {
		t.Fatalf("size %d, segment %d: everything passes", w.size, w.mss())
	}
	for range smallRounds + 1 {
		round()
	}
	if w.size != 1500 || w.mss() != 1460 {
		t.Errorf("size %d, segment %d after jumbo packets were lost", w.size, w.mss())
	}
	for range 2 * smallRounds {
		round()
		answer(1400 - 28)
	}
	if w.size != 1400 || w.mss() != 1360 {
		t.Errorf("size %d, segment %d where only 1400 bytes pass", w.size, w.mss())
	}
	answer(9000 - 28)
	if w.size != 9000 || w.mss() != 0 {
		t.Errorf("size %d, segment %d after the way was mended", w.size, w.mss())
	}
	w.failed() // big packets are suspected now, not in 25 rounds
	for range hurtRounds + 1 {
		round()
	}
	if w.size != 1500 {
		t.Errorf("size %d where a connection stood still and big probes do not come back", w.size)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	w.size, w.sendable = 1280, 9000
	if got := w.mss(); got != 1240 {
		t.Errorf("segment %d", got)
	}
}

func TestForeignPacketsAreNoProbes(t *testing.T) {
	p := NewPaths(PathsConfig{Every: time.Hour})
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	p.Watch(twoPaths)
	w := p.peers[twoPaths].paths[0]
	good := make([]byte, probeBytes)
	copy(good, probeMagic[:])
	good[15] = byte(w.id)
	for name, b := range map[string][]byte{"short": good[:40], "empty": nil, "other": make([]byte, probeBytes), "never sent": append(slices.Clone(good[:16]), 0, 0, 0, 0, 0, 0, 0, 9)} {
		p.answered(b)
		if w.known {
			t.Errorf("%s was taken for an answer", name)
		}
	}
	if isProbe(make([]byte, maxProbe+1)) || isProbe(nil) {
		t.Error("not a probe")
	}
}
