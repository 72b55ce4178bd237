package bird

import (
	"bufio"
	"errors"
	"net/netip"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"os"

	"github.com/cairnstore/cairn/proto/status"
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

// fabric is two hosts and a spine.
func fabric(p Protocol) Topology {
	return Topology{Protocol: p, Range: []netip.Prefix{netip.MustParsePrefix("10.255.0.0/16"), netip.MustParsePrefix("fd00:ca1f::/64")},
		Nodes: []Node{
			{Name: "host-1", ASN: 4200000001, Addrs: []netip.Addr{ip("10.255.0.1"), ip("fd00:ca1f::1")}},
			{Name: "host-2", ASN: 4200000002, Addrs: []netip.Addr{ip("10.255.0.2")}},
			{Name: "spine-1", Spine: true, ASN: 4200001001, Addrs: []netip.Addr{ip("10.255.1.1"), ip("fd00:ca1f::1:1")}},
		},
		Cables: []Cable{
			{Host: "host-1", HostLink: "s1", Spine: "spine-1", SpineLink: "h1", Key: "secret", Ends: []End{
				{Host: ip("10.101.1.1"), Spine: ip("10.101.1.0")}, {Host: ip("fd00:1:1::2"), Spine: ip("fd00:1:1::1")}}},
			{Host: "host-2", HostLink: "s1", Spine: "spine-1", SpineLink: "h2", Ends: []End{{Host: ip("10.101.2.1"), Spine: ip("10.101.2.0")}}},
		}}
}

// Every refusal begins with the field it is about.
func TestTopologyRefused(t *testing.T) {
	for _, c := range []struct {
		field string
		spoil func(*Topology)
	}{
		{"protocol", func(t *Topology) { t.Protocol = "isis" }},
		{"bfd.interval_ms", func(t *Topology) { t.BFD.IntervalMs = 5 }},
		{"bfd.multiplier", func(t *Topology) { t.BFD.Multiplier = 1 }},
		{"range", func(t *Topology) { t.Range = nil }},
		{"range[0]", func(t *Topology) { t.Range[0] = netip.MustParsePrefix("0.0.0.0/0") }},
		{"range[0]", func(t *Topology) { t.Range[0] = netip.MustParsePrefix("10.255.0.1/16") }},
		{"range[1]", func(t *Topology) { t.Range[1] = netip.MustParsePrefix("10.254.0.0/16") }},
		{"node[1].name", func(t *Topology) { t.Nodes[1].Name = "host-1" }},
		{"node[0].name", func(t *Topology) { t.Nodes[0].Name = "a\";b" }},
		{"node[1].asn", func(t *Topology) { t.Nodes[1].ASN = t.Nodes[0].ASN }},
		{"node[1].asn", func(t *Topology) { t.Nodes[1].ASN = 0 }},
		{"node[0].addrs", func(t *Topology) { t.Nodes[0].Addrs = nil }},
		{"node[0].addrs", func(t *Topology) { t.Nodes[0].Addrs = []netip.Addr{ip("10.1.0.1")} }},
		{"node[1].addrs", func(t *Topology) { t.Nodes[1].Addrs = t.Nodes[0].Addrs }},
		{"cable[0].host", func(t *Topology) { t.Cables[0].Host = "spine-1" }},
		{"cable[0].spine", func(t *Topology) { t.Cables[0].Spine = "host-2" }},
		{"cable[0].link", func(t *Topology) { t.Cables[0].HostLink = "lo" }},
		{"cable[1].link", func(t *Topology) { t.Cables[1].SpineLink = "h1" }},
		{"cable[0].key", func(t *Topology) { t.Cables[0].Key = "a\"b" }},
		{"cable[0].end", func(t *Topology) { t.Cables[0].Ends = nil }},
		{"cable[0].end", func(t *Topology) { t.Cables[0].Ends[0].Host = ip("10.255.0.9") }},
		{"cable[1].end", func(t *Topology) { t.Cables[1].Ends[0].Host = ip("10.101.1.1") }},
		{"cable[0].end", func(t *Topology) { t.Cables[0].Ends[0].Host = ip("224.0.0.1") }},
	} {
		top := fabric(BGP)
		c.spoil(&top)
		if _, err := top.Normal(); !errors.Is(err, status.Invalid) || !strings.HasPrefix(err.Error(), c.field+":") {
			t.Errorf("%s: got %v", c.field, err)
		}
	}
	n, err := fabric("").Normal()
	if err != nil || n.Protocol != BGP || n.BFD.IntervalMs != 100 || n.BFD.Multiplier != 3 {
		t.Errorf("the defaults: %+v, %v", n, err)
	}
	if _, err := n.Config("nobody"); !errors.Is(err, status.Invalid) {
		t.Errorf("a configuration for nobody: %v", err)
	}
}

// BIRD takes the configuration of every node with every protocol, and what
// keeps liars harmless stands in it.
func TestConfigs(t *testing.T) {
	binary, err := find("")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []Protocol{BGP, OSPF, RIP} {
		for _, off := range []bool{false, true} {
			top := fabric(p)
			top.BFD.Off = off
			top, err := top.Normal()
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range top.Nodes {
				text, err := top.Config(n.Name)
				if err != nil {
					t.Fatal(err)
				}
				file := filepath.Join(t.TempDir(), "bird.conf")
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
				if out, err := exec.Command(binary, "-p", "-c", file).CombinedOutput(); err != nil {
					t.Errorf("%s of %s: %s\n%s", p, n.Name, out, text)
				}
				wants := []string{"krt_prefsrc = " + n.Addrs[0].String(), "ttl security on", "secret"}
				if n.Name == "host-2" {
					wants = wants[:2]
				}
				if n.Spine {
					wants = append(wants, "filter from_port0_4 { if net = 10.255.0.1/32 then accept; reject; }",
						"filter from_port1_6 { reject; }", "import filter from_port0_4", "import filter from_port1_4")
				} else {
					wants = append(wants, "filter announce4 { if source = RTS_STATIC then accept; reject; }", "import filter from_spine4",
						"net ~ [ 10.255.0.0/16{32,32} ] && net != "+n.Addrs[0].String()+"/32")
				}
				if !off {
					wants = append(wants, "protocol bfd", "bfd on")
				}
				for _, w := range wants {
					if !strings.Contains(text, w) {
						t.Errorf("%s of %s has no %q:\n%s", p, n.Name, w, text)
					}
				}
				if off && strings.Contains(text, "bfd") {
					t.Errorf("%s of %s has BFD", p, n.Name)
				}
				if strings.Contains(text, "import all") || strings.Contains(text, "export all") {
					t.Errorf("%s of %s passes everything", p, n.Name)
				}
			}
		}
	}
}

func TestAnswers(t *testing.T) {
	for in, want := range map[string]string{
		"0001 BIRD 2.0.12 ready.\n":   "BIRD 2.0.12 ready.\n",
		"1002-a\n b\n1003-c\n0000 \n": "a\nb\nc\n\n",
		"0013 Daemon is up\n":         "Daemon is up\n",
		"+0003 late news\n0000 x\n":   "0003 late news\nx\n",
		"":                            "!",
		"1002-a\n":                    "!",
		"12\n":                        "!",
		strings.Repeat("1002-a\n", maxAnswer) + "0\n": "!",
	} {
		got, err := answer(bufio.NewReader(strings.NewReader(in)))
		if want == "!" {
			if err == nil {
				t.Errorf("%.20q was taken: %.20q", in, got)
			}
			continue
		}
		if err != nil || got != want {
			t.Errorf("%.20q gave %q, %v", in, got, err)
		}
	}
}

func FuzzAnswers(f *testing.F) {
	f.Add("0001 ready\n")
	f.Add("Name Proto\nto_s_4 BGP --- up 12:00:00 Established\n")
	f.Add("10.0.0.2/32 unicast [a 1] *\n\tvia 10.1.0.1 on s1\n")
	f.Fuzz(func(t *testing.T, s string) {
		if text, err := answer(bufio.NewReader(strings.NewReader(s))); err == nil {
			s = text
		}
		for _, x := range parseSessions(s) {
			if x.Name == "" || x.Kind == "" {
				t.Errorf("a session without a name from %q", s)
			}
		}
		for _, r := range parseRoutes(s) {
			if !strings.Contains(r.To, "/") {
				t.Errorf("%q is no destination", r.To)
			}
		}
	})
}

func TestParse(t *testing.T) {
	got := parseSessions(`Name       Proto      Table      State  Since         Info
device1    Device     ---        up     12:00:00.000
to_spine_1_4 BGP        ---        up     12:00:01.000  Established
to_spine_2_4 BGP        ---        start  12:00:02.000  Active        Socket: Connection refused
bfd1       BFD        ---        up     12:00:00.000
`)
	want := []Session{{"to_spine_1_4", "BGP", "up", "12:00:01.000", "Established"},
		{"to_spine_2_4", "BGP", "start", "12:00:02.000", "Active Socket: Connection refused"}, {"bfd1", "BFD", "up", "12:00:00.000", ""}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("sessions %+v", got)
	}
	routes := parseRoutes(`Table master4:
10.255.0.2/32        unicast [to_spine_1_4 12:00:01.000] * (100) [AS4200000002i]
	via 10.101.1.0 on s1
                     unicast [to_spine_2_4 12:00:01.000] (100) [AS4200000002i]
	via 10.102.1.0 on s2
10.255.0.1/32        unreachable [own4 12:00:00.000] * (200)
`)
	if want := []Route{{To: "10.255.0.2/32", From: "to_spine_1_4", Hops: []string{"via 10.101.1.0 on s1", "via 10.102.1.0 on s2"}},
		{To: "10.255.0.1/32", From: "own4"}}; !reflect.DeepEqual(routes, want) {
		t.Errorf("routes %+v", routes)
	}
	near := neighbours(`to_host_2_4:
Router ID   	Pri	     State     	DTime	Interface  Router IP
10.255.1.2  	  1	Full/PtP  	 3.880	s2         10.102.2.0
10.255.1.1  	  1	Init/PtP  	 3.924	s1         10.101.2.0
`)
	if near != "10.255.1.2 Full/PtP s2\n10.255.1.1 Init/PtP s1\n" {
		t.Errorf("neighbours %q", near)
	}
}
