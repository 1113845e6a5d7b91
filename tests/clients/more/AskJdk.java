// The JDK's HttpClient, as it is, which asks for HTTP/2 by an Upgrade header: an answer and a stream. In its own
// process; it is given a URL and a chat, and tells the bodies of the answer and of the stream, a line each.
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;

class AskJdk {
    public static void main(String[] given) throws Exception {
        var client = HttpClient.newHttpClient();
        for (String body : new String[] {given[1], given[2]}) {
            var request = HttpRequest.newBuilder(URI.create(given[0] + "/v1/chat/completions"))
                .header("content-type", "application/json")
                .POST(HttpRequest.BodyPublishers.ofString(body))
                .build();
            client.send(request, BodyHandlers.ofLines()).body().forEach(System.out::println);
        }
    }
}
