package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/netplane/agent"
	"github.com/cairnstore/cairn/netplane/link"
)

const goodNetwork = `
protocol = "bgp"
range = ["10.255.0.0/16"]
[[node]]
name = "host-1"
asn = 4200000001
addrs = ["10.255.0.1"]
[[node]]
name = "host-2"
asn = 4200000002
addrs = ["10.255.0.2"]
[[node]]
name = "spine-1"
spine = true
asn = 4200001001
addrs = ["10.255.1.1"]
[[cable]]
host = "host-1"
host_link = "s1"
spine = "spine-1"
spine_link = "h1"
key = "secret"
[[cable.end]]
host = "10.101.1.1"
spine = "10.101.1.0"
[[cable]]
host = "host-2"
host_link = "s1"
spine = "spine-1"
spine_link = "h2"
[[cable.end]]
host = "10.101.2.1"
spine = "10.101.2.0"
`

func hostFile(dir, data, network string) string {
	return `name = "host-1"
dir = "` + dir + `"
cluster = "c"
meta = ["10.255.0.1:7002,10.101.1.1:7002", "10.255.0.2:7002"]
data = "` + data + `"
control = "10.255.0.1:7001"
[[store]]
path = "` + dir + `/store"
[network]
topology = "` + dir + `/network.toml"
` + network
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A host's network is taken whole: addresses filled in and named.
func TestHostNetwork(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "network.toml"), goodNetwork)
	for data, names := range map[string]string{":7000": "stable spine-1", "10.101.1.1:7000,10.255.0.1:7000": "spine-1 stable", "10.255.0.1:7000": "stable"} {
		write(t, filepath.Join(dir, "host.toml"), hostFile(dir, data, "dscp = 26\n"))
		c, err := loadHostConfig(filepath.Join(dir, "host.toml"))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(c.Network.names, " "); got != names || data == ":7000" && c.Data != "10.255.0.1:7000,10.101.1.1:7000" || c.Network.DSCP != 26 {
			t.Errorf("%s became %s, paths %s", data, c.Data, got)
		}
	}
}

// Whatever is wrong is refused before anything is applied, naming the field.
func TestHostNetworkRefused(t *testing.T) {
	for _, c := range []struct{ what, from, to, data, network, field string }{
		{"protocol", `"bgp"`, `"isis"`, ":7000", "", "protocol:"},
		{"asn", "asn = 4200000002", "asn = 4200000001", ":7000", "", "node[1].asn:"},
		{"range", `"10.255.0.2"`, `"10.1.0.2"`, ":7000", "", "node[1].addrs:"},
		{"twice", `"10.101.2.1"`, `"10.101.1.1"`, ":7000", "", "cable[1].end:"},
		{"key", `"secret"`, `"two words"`, ":7000", "", "cable[0].key:"},
		{"unknown", "asn = 4200000001", "as = 1", ":7000", "", "node.as is not a setting"},
		{"no node", "x", "x", ":7000", "node = \"host-9\"\n", "network.node:"},
		{"a spine", "x", "x", ":7000", "node = \"spine-1\"\n", "network.node:"},
		{"dscp", "x", "x", ":7000", "dscp = 64\n", "network.dscp:"},
		{"elsewhere", "x", "x", "192.168.1.1:7000", "", "storage traffic would leave the storage network"},
		{"another's", "x", "x", "10.255.0.2:7000", "", "data: 10.255.0.2:7000"},
		{"no port", "x", "x", "10.255.0.1", "", "data:"},
	} {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "network.toml"), strings.Replace(goodNetwork, c.from, c.to, 1))
		write(t, filepath.Join(dir, "host.toml"), hostFile(dir, c.data, c.network))
		if _, err := loadHostConfig(filepath.Join(dir, "host.toml")); err == nil || !strings.Contains(err.Error(), c.field) {
			t.Errorf("%s: got %v, want %q", c.what, err, c.field)
		}
	}
}

// The picture has every node and link, and shows what does not work.
func TestNetworkPicture(t *testing.T) {
	w := &netView{Problems: []string{}, names: map[string]string{"b:1": "host-2", "a:1": "host-1"}, Silent: []string{"host-3"},
		Hosts: []netReport{
			{Host: "host-1", Network: &agent.Report{Links: []agent.Link{{Name: "s1", To: "spine-1", Up: true, Carrier: true}, {Name: "s2", To: "spine-2", Up: true}}},
				Paths: []link.PathState{{Peer: "b:1", Name: "stable", Alive: true, RTT: 1000}, {Peer: "b:1", Name: "spine-1", Alive: true}, {Peer: "b:1", Name: "spine-2"}}},
			{Host: "host-2", Paths: []link.PathState{{Peer: "a:1", Name: "spine-1", Alive: true}, {Peer: "a:1", Name: "spine-2"}}}}}
	w.diagnose()
	if len(w.Problems) != 1 || !strings.HasPrefix(w.Problems[0], "link s2 of host host-1 to spine-2 is without carrier") {
		t.Errorf("problems %q", w.Problems)
	}
	header, rows := w.reachTable()
	if strings.Join(header, " ") != "FROM TO STABLE SPINE-1 SPINE-2" || len(rows) != 2 || rows[0][4] != "dead" || rows[1][2] != "-" {
		t.Errorf("%v %v", header, rows)
	}
	svg := w.svg()
	for _, n := range []string{">host-1<", ">host-2<", ">host-3<", ">spine-1<", ">spine-2<", `stroke="#2a2"`, `stroke="#c22"`, `stroke="#999"`} {
		if !strings.Contains(svg, n) {
			t.Errorf("the picture has no %s:\n%s", n, svg)
		}
	}
	if strings.Count(svg, "<line") != 6 {
		t.Errorf("%d links drawn", strings.Count(svg, "<line"))
	}
}
