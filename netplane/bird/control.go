package bird

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// maxAnswer bounds the lines of one answer on the control socket.
const maxAnswer = 100_000

// Session is a routing session as BIRD sees it.
type Session struct {
	Name  string `json:"name"`  // to_PEER_4, rip4, ospf6 …
	Kind  string `json:"kind"`  // BGP, OSPF, RIP, BFD
	State string `json:"state"` // up, start, down
	Since string `json:"since"`
	Info  string `json:"info"` // Established, Active, …
}

// Route is a destination with its next hops.
type Route struct {
	To   string   `json:"to"`
	From string   `json:"from"` // the session it came over
	Hops []string `json:"hops"`
}

// Status is what a daemon and its BIRD say of themselves.
type Status struct {
	Node     string    `json:"node"`
	Pid      int       `json:"pid"` // 0: not running
	Restarts int       `json:"restarts"`
	Why      string    `json:"why"` // of the last restart
	Sessions []Session `json:"sessions"`
	Routes   []Route   `json:"routes"`
}

// Status reads the state over the control socket.
func (d *Daemon) Status() (Status, error) {
	d.mu.Lock()
	st := Status{Node: d.cfg.Node, Pid: d.pid, Restarts: d.restarts, Why: d.why}
	d.mu.Unlock()
	out, err := d.ask("show protocols")
	if err != nil {
		return st, err
	}
	st.Sessions = parseSessions(out)
	if out, err = d.ask("show route"); err != nil {
		return st, err
	}
	st.Routes = parseRoutes(out)
	return st, nil
}

// ask sends one command and returns the answer's text.
func (d *Daemon) ask(command string) (text string, err error) {
	c, err := net.DialTimeout("unix", d.socket(), answerIn)
	if err != nil {
		return "", status.Errorf(status.Unavailable, "no way to BIRD's control socket: %w", err)
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if err := c.SetDeadline(time.Now().Add(answerIn)); err != nil {
		return "", err
	}
	in := bufio.NewReader(c)
	if _, err := answer(in); err != nil { // the greeting
		return "", err
	}
	if _, err := fmt.Fprintln(c, command); err != nil {
		return "", status.Errorf(status.Unavailable, "BIRD takes no command: %w", err)
	}
	return answer(in)
}

// answer reads lines "NNNN-text" (more follow), " text" (of the same), and
// "NNNN text" (the last).
func answer(in *bufio.Reader) (string, error) {
	var b strings.Builder
	for range maxAnswer {
		line, err := in.ReadString('\n')
		if err != nil {
			return "", status.Errorf(status.Unavailable, "BIRD gives no answer: %w", err)
		}
		if line[0] == ' ' || line[0] == '+' {
			b.WriteString(line[1:])
			continue
		}
		if len(line) < 6 {
			return "", status.Errorf(status.Corrupt, "BIRD says %q, which is no answer", line)
		}
		b.WriteString(line[5:])
		if line[4] == ' ' {
			return b.String(), nil
		}
	}
	return "", status.Errorf(status.TooBig, "BIRD's answer has more than %d lines", maxAnswer)
}

// parseSessions takes the rows of "show protocols" that are about neighbours.
func parseSessions(text string) (out []Session) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		switch f[1] {
		case "BGP", "OSPF", "RIP", "RIPng", "BFD":
			out = append(out, Session{Name: f[0], Kind: f[1], State: f[3], Since: f[4], Info: strings.Join(f[5:], " ")})
		}
	}
	return out
}

// neighbours takes the rows of "show ospf neighbors" without their timers:
//
//	Router ID   Pri  State     DTime  Interface  Router IP
//	10.255.1.2    1  Full/PtP  3.880  s2         10.102.2.0
func neighbours(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) == 6 && strings.Contains(f[2], "/") {
			fmt.Fprintln(&b, f[0], f[2], f[4])
		}
	}
	return b.String()
}

// parseRoutes takes the best routes of "show route":
//
//	10.0.0.2/32  unicast [to_s1_4 12:00:00] * (100) [AS2i]
//		via 10.1.0.1 on s1
//	             unicast [to_s2_4 12:00:00] (100) [AS2i]
//		via 10.1.1.1 on s2
//
// What BGP has of equal worth besides goes into the kernel with the best, and
// is listed with it.
func parseRoutes(text string) (out []Route) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		switch {
		case len(f) >= 2 && f[0] == "Table":
		case len(f) >= 3 && strings.Contains(f[0], "/"):
			out = append(out, Route{To: f[0], From: strings.TrimPrefix(f[2], "[")})
		case len(f) >= 4 && f[0] == "via" && len(out) > 0:
			r := &out[len(out)-1]
			r.Hops = append(r.Hops, strings.Join(f[:4], " "))
		}
	}
	return out
}

// flushRoutes removes BIRD's routes of the calling thread's namespace.
func flushRoutes() (err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open a netlink socket: %w", err)
	}
	defer h.Close()
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := h.RouteListFiltered(family, &netlink.Route{Protocol: KernelProtocol}, netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			return fmt.Errorf("list BIRD's routes: %w", err)
		}
		for _, r := range routes {
			if r.Priority != KernelMetric {
				continue
			}
			if err := h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("remove the route to %v that BIRD left: %w", r.Dst, err)
			}
		}
	}
	return nil
}
