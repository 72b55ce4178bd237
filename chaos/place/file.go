package place

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// A trace file is text, one event a line, in order of time:
//
//	# a comment
//	host NAME RACK CPU MEMORY             before all events; CPU in thousandths, memory in bytes
//	TIME vm NAME CPU MEMORY LIFE TENANT CLASS DATA…
//	TIME fail|return|drain|resume HOST…   hosts by their position, from 0
//	TIME rebalance
//
// TIME and LIFE are milliseconds; LIFE 0 is until the end; a tenant may be "-".
// DATA is a part of the VM's data: HOST,HOST,…:HEAT:BYTES, with the hosts that
// have a replica and the bytes read a second.

// Bounds of a trace file.
const (
	maxTraceHosts  = 100_000
	maxTraceEvents = 10_000_000
	maxTraceLine   = 1 << 20
)

// Write writes a trace as a file.
func (t *Trace) Write(w io.Writer) error {
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, "# trace %s, seed %d\n", t.Name, t.Seed)
	for _, h := range t.Hosts {
		fmt.Fprintf(b, "host %s %s %d %d\n", h.Name, h.Rack, h.CPU, h.Memory)
	}
	for _, e := range t.Events {
		fmt.Fprintf(b, "%d %s", e.AtMs, e.Kind)
		if e.Kind == Arrive {
			tenant := e.Tenant
			if tenant == "" {
				tenant = "-"
			}
			fmt.Fprintf(b, " %s %d %d %d %s %d", e.VM, e.CPU, e.Memory, e.LifeMs, tenant, e.Class)
			for _, d := range e.Data {
				fmt.Fprintf(b, " %s:%g:%d", join(d.Hosts, ","), d.Heat, d.Bytes)
			}
		} else if len(e.Hosts) > 0 {
			fmt.Fprintf(b, " %s", join(e.Hosts, " "))
		}
		fmt.Fprintln(b)
	}
	return b.Flush() // holds back every error of the lines above
}

func join(ns []int, sep string) string {
	var out []string
	for _, n := range ns {
		out = append(out, strconv.Itoa(n))
	}
	return strings.Join(out, sep)
}

// Read reads a trace file.
func Read(r io.Reader, name string) (*Trace, error) {
	t := &Trace{Name: name, Seed: 1}
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxTraceLine)
	for n := 1; s.Scan(); n++ {
		f := strings.Fields(s.Text())
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		if err := t.line(f); err != nil {
			return nil, fmt.Errorf("trace %s, line %d: %w", name, n, err)
		}
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("trace %s: %w", name, err)
	}
	if len(t.Hosts) == 0 {
		return nil, fmt.Errorf("trace %s has no hosts", name)
	}
	return t, nil
}

// fields reads numbers and keeps the first error.
type fields struct{ err error }

func (f *fields) uint(s string) uint64 {
	n, err := strconv.ParseUint(s, 10, 62)
	if err != nil && f.err == nil {
		f.err = fmt.Errorf("%q is not a number of 0 or more", s)
	}
	return n
}

func (t *Trace) line(f []string) error {
	var in fields
	if f[0] == "host" {
		if len(f) != 5 || len(t.Events) > 0 || len(t.Hosts) >= maxTraceHosts {
			return fmt.Errorf("a host is `host NAME RACK CPU MEMORY`, before all events, at most %d of them", maxTraceHosts)
		}
		h := Host{Name: f[1], Rack: f[2], CPU: in.uint(f[3]), Memory: in.uint(f[4])}
		if in.err == nil && (h.CPU == 0 || h.Memory == 0) {
			return fmt.Errorf("host %s has no processors or no memory", h.Name)
		}
		t.Hosts = append(t.Hosts, h)
		return in.err
	}
	if len(f) < 2 || len(t.Events) >= maxTraceEvents {
		return fmt.Errorf("an event is `TIME KIND …`, at most %d of them", maxTraceEvents)
	}
	e := Event{AtMs: int64(in.uint(f[0])), Kind: Kind(f[1])}
	if n := len(t.Events); n > 0 && t.Events[n-1].AtMs > e.AtMs {
		return fmt.Errorf("time goes back from %d to %d", t.Events[n-1].AtMs, e.AtMs)
	}
	var err error
	switch e.Kind {
	case Arrive:
		err = t.arrival(&e, f[2:], &in)
	case Fail, Return, Drain, Resume, Rebalance:
		e.Hosts, err = t.hosts(f[2:], &in)
	default:
		err = fmt.Errorf("%q is not an event: vm, fail, return, drain, resume or rebalance", f[1])
	}
	t.Events = append(t.Events, e)
	if err == nil {
		err = in.err
	}
	return err
}

func (t *Trace) arrival(e *Event, f []string, in *fields) error {
	if len(f) < 6 {
		return fmt.Errorf("a VM is `TIME vm NAME CPU MEMORY LIFE TENANT CLASS DATA…`")
	}
	e.VM, e.CPU, e.Memory, e.LifeMs = f[0], in.uint(f[1]), in.uint(f[2]), int64(in.uint(f[3]))
	if e.Tenant = f[4]; e.Tenant == "-" {
		e.Tenant = ""
	}
	class, err := strconv.Atoi(f[5])
	if err != nil {
		return fmt.Errorf("class %q is not a number", f[5])
	}
	e.Class = class
	for _, text := range f[6:] {
		p := strings.Split(text, ":")
		if len(p) != 3 {
			return fmt.Errorf("data %q is not HOST,HOST,…:HEAT:BYTES", text)
		}
		hosts, err := t.hosts(strings.Split(p[0], ","), in)
		if err != nil {
			return err
		}
		heat, err := strconv.ParseFloat(p[1], 64)
		if err != nil || !(heat >= 0 && heat < 1e18) {
			return fmt.Errorf("heat %q is not a number of 0 or more", p[1])
		}
		e.Data = append(e.Data, Data{hosts, heat, in.uint(p[2])})
	}
	return nil
}

func (t *Trace) hosts(f []string, in *fields) ([]int, error) {
	var out []int
	for _, s := range f {
		n := in.uint(s)
		if in.err == nil && n >= uint64(len(t.Hosts)) {
			return nil, fmt.Errorf("there is no host %d: the trace has %d", n, len(t.Hosts))
		}
		out = append(out, int(n))
	}
	return out, in.err
}
