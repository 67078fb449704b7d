def test_four_hosts(ray_hosts):
    print(ray_hosts.address, ray_hosts.count_nodes())
    for h in ray_hosts.network.hosts:
        print(h.run("bash", "-c", "hostname; ip -o addr | grep eth0; ls /tmp /mnt/storage; getent hosts $(hostname); ps ax | wc -l"))
    import urllib.request, json

    r = urllib.request.Request(
        ray_hosts.address + "/nodes?view=summary", headers={"Authorization": "Bearer a-token-that-only-the-tests-know-0123456789"}
    )
    print(json.dumps(json.load(urllib.request.urlopen(r))["data"]["summary"][0], indent=1)[:6000])
